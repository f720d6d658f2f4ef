"""Which learned rewards do not read the policy's tokens, and how texts are written for them."""

import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax import build
from rlhf_jax.base_files import own_tokenizer
from rlhf_jax.data.forms import Form
from rlhf_jax.rewards.other_tokens import Writer
from rlhf_jax.schema import within
from rlhf_jax.text.steps import token_tables
from rlhf_jax.text.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)
_KEYS = ("tokenizer", "template", "chat", "max_prompt", "max_tokens")


def own_tokenizers(config: ConfigDict, text: Tokenizer) -> dict[str, Tokenizer]:
    """The tokenizers of learned rewards that are not the policy's, by label.

    A reward's section may name one; else it is that of the folder that the reward starts from.

    Raises:
        ValueError: a tokenizer that cannot be loaded, or keys of one where there is no need.
    """
    found = {}
    for label, section in config.rewards.items():
        path = f"rewards.{label}"
        learned = build.reward_model(section, path) is not None
        name = said = section.get("tokenizer", "")
        if learned and not name and section.get("init_from", ""):
            with within(f"{path}.init_from"):
                name, said, *_ = own_tokenizer(section.init_from)
        if learned and name and said != config.data.tokenizer:
            with within(f"{path}.tokenizer"):
                own = load_tokenizer(name)
            if not same_tokens(own, text):
                found[label] = own
                _log.info(
                    "%s reads the tokens of %s, the policy writes those of %s: its texts are "
                    "decoded and encoded again on the host",
                    path, said, config.data.tokenizer,
                )  # fmt: skip
        odd = [key for key in _KEYS if key in section and label not in found]
        if odd:
            raise ValueError(
                f"{path}.{odd[0]} is set, but the reward reads the policy's tokens; leave it out"
            )
    return found


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same meaning to the same ids."""
    return one.vocab_size == other.vocab_size and one.token_texts() == other.token_texts()


def writers(
    config: ConfigDict, own: Mapping[str, Tokenizer], vocab_sizes: Mapping[str, int]
) -> dict[str, Writer]:
    """How texts are written for the rewards of `own`, by label.

    Args:
        vocab_sizes: of their models.

    Raises:
        ValueError: a template that does not fit the tokenizer.
    """
    made = {}
    for label, tokenizer in own.items():
        section = config.rewards[label]
        asked = {
            key: section.get(key) for key in ("template", "chat") if section.get(key) is not None
        }
        form = asked or {key: config.data.get(key) for key in ("template", "chat")}
        with within(f"rewards.{label}"):
            written = Form(tokenizer, template=form.get("template"), chat=form.get("chat")).written

        def write(record, completion, truncated, written=written):
            row = written(record, completion, truncated=truncated)
            return row.tokens, row.prompt

        made[label] = Writer(
            write=write,
            encode=tokenizer.encode,
            tables=token_tables(tokenizer, vocab_size=vocab_sizes[label]),
            **row_sizes(config, section),
        )
    return made


def row_sizes(config: ConfigDict, section: ConfigDict | dict[str, Any]) -> dict[str, int]:
    """``max_prompt`` and ``max_tokens`` of a model's rows: the run's, or a reward's own.

    Args:
        section: of a reward; {} for a model that reads what the policy writes.
    """
    return dict(
        max_prompt=section.get("max_prompt", config.data.max_prompt),
        max_tokens=section.get("max_tokens", config.rollout.max_tokens),
    )
