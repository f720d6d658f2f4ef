"""Answers that records hold as rollouts, and their scores for rewards that are `relative` to them.

A record's field (`rewards.<label>.relative.answers`) holds an answer to its prompt, or several: a
demonstration, say, or what `rlhf_jax.generate` wrote under ``completions``. They are scored once,
by the reward as it is before the first step, each text in the tokens that the reward reads, and
closed by end-of-text unless it is longer than a completion may be.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from rlhf_jax.data.forms import Form
from rlhf_jax.data.prompts import PromptSource, pad_left
from rlhf_jax.data.sources import Record
from rlhf_jax.mesh import ShardingRules, fetch_host, shard_batch
from rlhf_jax.rewards.other_tokens import Writer
from rlhf_jax.rewards.shaping import References
from rlhf_jax.schema import within
from rlhf_jax.text.steps import mark_host_step_ends
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Prompts, Reward, Rollouts, TokenTables

_log = logging.getLogger(__name__)


class Answers(NamedTuple):
    """Where given answers are and how they become rollouts, ``rows`` at a time."""

    field: str
    prompts: PromptSource
    writer: Writer
    rows: int

    @property
    def records(self) -> int:
        """`Prompts.record` is below."""
        return 1 + max(record for _, record in self.prompts.places)


def references(label: str, answers: Answers, mesh: Mesh, rules: ShardingRules) -> References:
    """What `rewards.shaping.relative` asks of the reward under ``label``: the mean score of each
    record's answers, 0 for records that are never drawn."""
    return functools.partial(_scores, label, answers, mesh, rules)


def check_answers(config: ConfigDict, prompts: PromptSource) -> None:
    """Raises a ValueError for the first record without the answers that a reward is relative to."""
    for label, section in config.rewards.items():
        if "relative" in section:
            with within(f"rewards.{label}.relative.answers"):
                check_field(prompts, section.relative.answers)


def check_field(prompts: PromptSource, field: str) -> None:
    """Raises a ValueError for the first record that holds no answers under a field."""
    for source, record in prompts.places:
        with within(prompts.place(source, record)):
            answers_of(prompts.record(source, record), field)


def answers_of(record: Record, field: str) -> Sequence[str]:
    """The texts under a field: one, or a list.

    Raises:
        ValueError: there is no such field, or it holds something else.
    """
    if field not in record:
        raise ValueError(f"no field {field!r}; the record has {', '.join(record)}")
    texts = [record[field]] if isinstance(record[field], str) else record[field]
    if not isinstance(texts, list | tuple) or not texts or not all(map(_is_text, texts)):
        raise ValueError(
            f"field {field!r} holds {record[field]!r}; wanted the text of an answer, or a list of "
            "such texts"
        )
    return texts


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def own_writer(config: ConfigDict, text: Tokenizer, tables: TokenTables) -> Writer:
    """How answers are written in the policy's own tokens."""
    data = config.data
    form = Form(text, template=data.get("template"), chat=data.get("chat"))

    def write(record, answer, truncated):
        row = form.written(record, answer, truncated=truncated)
        return row.tokens, row.prompt

    return Writer(write, text.encode, tables, data.max_prompt, config.rollout.max_tokens)


def _scores(
    label: str, answers: Answers, mesh: Mesh, rules: ShardingRules, reward: Reward, state: Any
) -> Float[np.ndarray, " R"]:
    score = jax.jit(reward.score) if reward.where == "device" else reward.score
    total, count = (np.zeros(answers.records) for _ in range(2))
    for rollouts, rows in batches_of(answers):
        scores, _ = score(state, shard_batch(mesh, rules, rollouts))
        record = rollouts.prompts.record[:rows]
        np.add.at(total, record, fetch_host(scores.outcome)[:rows].astype(np.float64))
        np.add.at(count, record, 1)
    bad = np.flatnonzero(~np.isfinite(total))
    if bad.size:
        where = answers.prompts.place(0, int(bad[0]))
        raise ValueError(
            f"rewards.{label}.relative: the score of the reference answer of {where} is "
            f"{total[bad[0]]}; {bad.size} records have no finite one"
        )
    _log.info("rewards.%s: scored %d reference answers", label, count.sum())
    return (total / np.maximum(count, 1)).astype(np.float32)


def batches_of(answers: Answers) -> Iterator[tuple[Rollouts, int]]:
    """Rollouts of one completion per prompt, and how many rows count: the rest fill the last."""
    written = []
    for source, index in answers.prompts.places:
        record = answers.prompts.record(source, index)
        for text in answers_of(record, answers.field):
            ids, start = answers.writer.write(record, text, False)
            written.append({"record": index, "prompt": ids[:start], "completion": ids[start:]})
            if len(written) == answers.rows:
                yield _rollouts(written, answers.writer), len(written)
                written = []
    if written:
        filled = written + written[-1:] * (answers.rows - len(written))
        yield _rollouts(filled, answers.writer), len(written)


def _rollouts(written: Sequence[Mapping[str, Any]], writer: Writer) -> Rollouts:
    """Rows as rollouts; what is longer than a row loses the prompt's beginning and its own end."""
    pad, width, count = int(writer.tables.pad), writer.max_tokens, len(written)
    before, before_mask = pad_left([one["prompt"] for one in written], writer.max_prompt, pad)
    tokens = np.full((count, width), pad, np.int32)
    lengths = np.array([min(len(one["completion"]), width) for one in written])
    for row, one in enumerate(written):
        tokens[row, : lengths[row]] = one["completion"][:width]
    mask = np.arange(width)[None] < lengths[:, None]
    none, zeros = np.zeros(count, np.int32), np.zeros(mask.shape, np.float32)
    return Rollouts(
        prompts=Prompts(
            tokens=before,
            mask=before_mask,
            record=np.array([one["record"] for one in written], np.int32),
            source=none,
            draw=none,
        ),
        tokens=tokens,
        mask=mask,
        step_ends=mark_host_step_ends(tokens, mask, writer.tables),
        logprobs=zeros,
        behaviour_logprobs=zeros,
        truncated=np.array([len(one["completion"]) > width for one in written]),
        sample=none,
        version=none,
    )
