"""Outcome and process reward models, from pairs, correctness and step labels in one mixture.

    python -m rlhf_jax.train_reward --config=configs/X.py --workdir=DIR

One trunk with the scalar heads of ``reward.score_heads``: "outcome" scores a text at its last
token, "process" every step at its end. A single head of any name does both.

With ``reward.members`` of 2 or more it is an ensemble of the family ``reward.ensemble``: whole
models ("independent"), heads on one trunk ("linear"), or adapters and heads on one frozen trunk
("lora", with ``model.lora_rank``). A LoRA ensemble can start from a linear one
(``model.init_from``), which trained trunk and heads on other data.

With ``reward.advantage`` the heads "outcome" and "expected" become an advantage model, whose scores
stay in bounds and are told apart from what is expected of the prompt (`rlhf_jax.ops.advantage`);
with ``reward.odin`` the heads "quality" and "length" keep length out of quality
(`rlhf_jax.ops.odin`).

With the model its card is saved (card.md, card.json): where the data come from, who judged, what it
is worth and what moves it besides quality; see `rlhf_jax.card` and `rlhf_jax.probes`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import build, card, fit, program
from rlhf_jax.data.examples import Row, pad_rows
from rlhf_jax.data.forms import Form
from rlhf_jax.data.members import MemberSource
from rlhf_jax.data.sources import open_source
from rlhf_jax.mesh import batch_shards, fetch_host, shard_batch
from rlhf_jax.models.completions import evaluate_texts, text_scores
from rlhf_jax.models.heads import (
    EXPECTED_HEAD,
    LENGTH_HEAD,
    OUTCOME_HEAD,
    QUALITY_HEAD,
    judging_head,
)
from rlhf_jax.models.passes import longest_row
from rlhf_jax.ops.advantage import Advantage, advantage
from rlhf_jax.ops.odin import Odin, odin
from rlhf_jax.probes import Asked, Score, Text, probe, read_items, read_pairs
from rlhf_jax.schema import within
from rlhf_jax.token_lines import batch_rows, padded
from rlhf_jax.training.supervised import Joint
from rlhf_jax.types import Params, RunState

KINDS = ("pairs", "correctness", "steps")


class _Together(NamedTuple):
    """Heads that train together: the section's factory, the heads, those that mean nothing else,
    and what else the model may have."""

    factory: Callable[..., Joint]
    heads: tuple[str, ...]
    own: tuple[str, ...]
    more: tuple[str, ...] = ()


_JOINT = {
    "advantage": _Together(
        advantage, (OUTCOME_HEAD, EXPECTED_HEAD), (EXPECTED_HEAD,), more=("process",)
    ),
    "odin": _Together(odin, (QUALITY_HEAD, LENGTH_HEAD), (QUALITY_HEAD, LENGTH_HEAD)),
}
_RECORDS = 64  # that are probed, unless the config says
_ROWS = 16  # texts at a time


class Probed(NamedTuple):
    """What the card probes: a source by label and use, the head that judges its texts ("": that
    of texts), and probes of one's own."""

    label: str
    use: str
    head: str
    asked: Sequence[Asked]


def check(config: ConfigDict) -> fit.Fit:
    """Checks ``config`` and builds what needs neither parameters nor data."""
    heads = tuple(config.reward.score_heads)
    if not heads:
        raise ValueError("reward.score_heads is empty; name at least one head, such as 'outcome'")
    card.check_card(config)
    members = config.reward.get("members", 1)
    family = config.reward.get("ensemble", "none")
    changes = dict(lm_head=False, score_heads=heads, members=members, ensemble=family)
    joint = joint_of(config)
    # Of unlabelled answers an advantage model learns what is expected of their prompts.
    kinds = (*KINDS, "texts") if isinstance(joint, Advantage) else KINDS
    planned = fit.check(config, "reward", kinds, joint=joint, **changes)
    for part, sections in (("sources", config.sources), ("eval.sources", config.eval.sources)):
        for label, section in sections.items():
            _check_source(f"{part}.{label}", section, joint)
    if joint is not None and all(one.kind != "pairs" for one in config.sources.values()):
        raise ValueError(
            f"reward.{_name(joint)} but sources {', '.join(config.sources)} are not of kind pairs; "
            "add a source of pairs"
        )
    return planned


def joint_of(config: ConfigDict) -> Joint | None:
    """How heads that train together say one score; None where each trains for itself.

    Raises:
        ValueError: heads and sections that do not fit each other, or values that cannot be.
    """
    section, heads = config.reward, tuple(config.reward.score_heads)
    given = [name for name in _JOINT if name in section]
    if len(given) > 1:
        raise ValueError("reward.advantage and reward.odin are both set; leave one of them out")
    named = [name for name, one in _JOINT.items() if set(heads) & set(one.own) == set(one.own)]
    for name in given:
        wanted, more = _JOINT[name].heads, _JOINT[name].more
        if not set(wanted) <= set(heads) or not set(heads) <= {*wanted, *more}:
            raise ValueError(
                f"reward.score_heads={heads} with reward.{name}; wanted {wanted}"
                + (f" and beside them at most {more}" if more else "")
            )
        return build.call(f"reward.{name}", _JOINT[name].factory, section[name].to_dict())
    if named:
        raise ValueError(
            f"reward.score_heads={heads} has the heads of reward.{named[0]}, which is missing; set "
            f"reward.{named[0]}=dict(), or name the heads otherwise"
        )
    return None


def _name(joint: Joint) -> str:
    return "advantage" if isinstance(joint, Advantage) else "odin"


def _check_source(path: str, section: ConfigDict, joint: Joint | None) -> None:
    """Raises a ValueError for a source that cannot train, or judge, heads that train together."""
    if joint is None:
        return
    if isinstance(joint, Odin) and section.kind != "pairs":
        raise ValueError(
            f"{path}.kind={section.kind!r} with reward.odin, which trains on pairs alone: leave "
            "the source out"
        )
    if isinstance(joint, Advantage) and section.get("template") == "":
        raise ValueError(
            f"{path}.template='' with reward.advantage, which reads what is expected at the end of "
            "the prompt; name the prompt in the template"
        )
    if section.kind == "texts" and "chat" in section and section.get("turns") != "last":
        raise ValueError(
            f"{path}.turns={section.get('turns', 'all')!r} with reward.advantage: the prompt of a "
            "sampled answer is all that comes before it; set turns='last'"
        )
    if "head" in section and section.kind != "steps":
        raise ValueError(
            f"{path}.head={section.head!r} with reward.{_name(joint)}, whose heads train together; "
            "leave head out"
        )


def open_probes(
    config: ConfigDict, later: Callable[[ConfigDict], bool] = lambda section: False
) -> Probed:
    """What the card will be probed on; reads a file of one's own pairs.

    Args:
        later: see `fit.open_sources`.

    Raises:
        ValueError: naming ``card.probes.pairs``, file and line.
    """
    section = config.card.get("probes", {})
    known = config.eval.sources or config.sources
    # Pairs have two texts for a prompt, which all probes can read.
    first = min(known, key=lambda label: known[label].kind != "pairs")
    label = section.get("source", "") or first
    use = "held out" if label in config.eval.sources else "training"
    sources = config.eval.sources if use == "held out" else config.sources
    name, head = section.get("pairs", ""), sources[label].get("head", "")
    if not name or later(ConfigDict(dict(name=name))):
        return Probed(label, use, head, ())
    text = build.tokenizer(config)
    form = {key: sources[label].get(key) for key in ("template", "chat")}
    with within("card.probes.pairs"):
        own = dict(prompted="advantage" in config.reward)
        asked = read_pairs(open_source(name), Form(text, **form), text, **own)
        return Probed(label, use, head, asked)


def train_reward(config: ConfigDict, workdir: str) -> RunState:
    """Trains the reward model that ``config`` describes on its mixture of sources.

    Resumes if ``workdir`` has a checkpoint. A policy run uses the folder as the ``init_from``
    of its learned rewards. In the end the model's card is written (see `rlhf_jax.card`).

    Raises:
        ValueError: for bad input, before any device is touched.
        FloatingPointError: after ``train.max_skipped`` non-finite updates in a row.
    """
    planned = fit.open_sources(check(config))
    probed = open_probes(config)
    data = card.data_facts(planned)  # files as they were when they were read

    def conclude(folder, state: RunState, numbers: Mapping[str, Any]) -> None:
        found = probes(planned, probed, state)
        kept = {n: x for n, x in numbers.items() if n.startswith("eval/")}
        card.write(folder, card.facts_of(planned, data, kept, found))

    return fit.run(planned, workdir, conclude)


def probes(planned: fit.Fit, probed: Probed, state: RunState) -> dict[str, Any]:
    """What the card says of probes: on which records, and what was found."""
    config, text = planned.config, build.tokenizer(planned.config)
    opened = planned.held_out if probed.use == "held out" else planned.sources
    source = opened[probed.label]
    source = source.source if isinstance(source, MemberSource) else source
    limit = config.card.get("probes", {}).get("records", _RECORDS)
    items = read_items(source, limit, text)
    heads = planned.described.score_heads
    head = probed.head or judging_head(heads)
    params = state.train.params[planned.role]
    score = scorer(planned, params, state.reference, head, text.pad_id)
    widest = longest_row(planned.described)
    found = probe(items, probed.asked, text, score, widest=widest)
    asked = dict(source=probed.label, use=probed.use, head=head, records=len(items))
    return asked | dict(findings=card.probe_facts(found))


def scorer(planned: fit.Fit, params: Params, frozen: Params, head: str, pad: int) -> Score:
    """A function from texts to what the model says of them: a head at their last token, of an
    advantage model less what is expected of the prompt."""
    model = planned.model

    @jax.jit
    def forward(params, frozen, texts):
        return text_scores(evaluate_texts(model, params, frozen, texts).scores, texts, head)

    def score(texts: Sequence[Text]) -> list[float]:
        longest = max(len(text.whole) for text in texts)
        width = int(min(padded(longest), longest_row(planned.described)))
        shards = batch_shards(planned.mesh, planned.rules)
        rows = batch_rows(_ROWS, len(texts), shards)
        found: list[float] = []
        for first in range(0, len(texts), rows):
            part = [Row(list(t.whole), len(t.prompt)) for t in texts[first : first + rows]]
            part += part[-1:] * (rows - len(part))
            batch = shard_batch(planned.mesh, planned.rules, pad_rows(part, width, pad))
            found += fetch_host(forward(params, frozen, batch)).astype(np.float64).tolist()
        return found[: len(texts)]

    return score


if __name__ == "__main__":
    program.run_program(train_reward)
