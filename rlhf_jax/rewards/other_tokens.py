"""A learned reward whose tokenizer is not the policy's: texts cross the host, scores come back.

Completions are decoded, written anew in the reward model's tokens, scored on the devices as ever,
and step scores are put where the policy's steps end: the s-th step of a text is the s-th step in
both tokenizations (see `text.steps`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from rlhf_jax.rewards.host import Decode, HostBatch, HostScore, Records, local_rows, spread
from rlhf_jax.text.question import Encode
from rlhf_jax.text.steps import mark_host_step_ends
from rlhf_jax.types import Array, Prompts, Reward, Rollouts, Scores, TokenTables


class Writer(NamedTuple):
    """How a text is written in the reward model's tokens.

    write(record, completion, truncated) -> (ids of both, how many of them are the prompt's)
    encode(text) -> ids, without special ones.
    tables: what its ids mean.
    max_prompt, max_tokens: sizes of a row; longer prompts lose their beginning, longer completions
        their end.
    """

    write: Callable[[Mapping[str, Any], str, bool], tuple[list[int], int]]
    encode: Encode
    tables: TokenTables
    max_prompt: int
    max_tokens: int


def translated(inner: Reward, writer: Writer, *, decode: Decode, records: Records) -> Reward:
    """`inner`, a reward on the devices, for rollouts in other tokens.

    The part ``<name>/cut`` is 1 on rows that were longer than `writer` allows, so its mean is their
    share.

    Args:
        decode: the policy's ids of a row -> text.
        records: (source, record) -> the record that the prompt was made of.

    Raises:
        ValueError: `inner` learns online, or is no reward on the devices.
    """
    if inner.where != "device" or inner.update is not None:
        raise ValueError(f"reward {inner.name!r} cannot read texts of another tokenizer")

    def convert(rollouts: Rollouts, rows: Mapping) -> tuple[Rollouts, dict[int, float]]:
        return _translate(rollouts, rows, writer, records)

    @jax.jit
    def compiled(state, theirs, ends):
        scores, new = inner.score(state, theirs)
        process = carry_back(scores.process, theirs.step_ends & theirs.mask, ends)
        # What comes back as it went in, such as parameters, stays the array that it is.
        changed = jax.tree.map(lambda n, old: None if n is old else n, new, state)
        return Scores(outcome=scores.outcome, process=process, parts=scores.parts), changed

    def judge(state, batch: HostBatch):
        rollouts = batch.rollouts
        theirs, cut = convert(rollouts, batch.rows(decode))
        scores, new = compiled(state, theirs, rollouts.step_ends & rollouts.mask)
        state = jax.tree.map(
            lambda n, old: old if n is None else n, new, state, is_leaf=lambda n: n is None
        )
        parts = {**scores.parts, f"{inner.name}/cut": spread(cut, rollouts.truncated)}
        return Scores(outcome=scores.outcome, process=scores.process, parts=parts), state

    def calibrate(state, rollouts):
        return inner.calibrate(state, convert(rollouts, HostBatch(rollouts).rows(decode))[0])

    return inner._replace(
        where="host",
        score=HostScore(judge),
        calibrate=calibrate if inner.calibrate is not None else None,
    )


def carry_back(
    process: Float[Array, "B R"], ends: Bool[Array, "B R"], ours: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Scores at the ends of steps in one tokenization, at the ends of the same steps in another.

    Should one have more ends (a token may close two lines at once), what has no partner goes to
    the last one: the sum of a row stays.
    """
    last = jnp.maximum(jnp.sum(ours, axis=-1, keepdims=True) - 1, 0)
    number = jnp.minimum(jnp.cumsum(ends, axis=-1) - 1, last)
    rows = jnp.broadcast_to(jnp.arange(ends.shape[0])[:, None], ends.shape)
    paid = jnp.where(ends, process, 0.0)
    by_step = jnp.zeros(ours.shape, jnp.float32).at[rows, jnp.maximum(number, 0)].add(paid)
    mine = jnp.maximum(jnp.cumsum(ours, axis=-1) - 1, 0)
    return jnp.where(ours, jnp.take_along_axis(by_step, mine, axis=1), 0.0)


def _translate(rollouts, rows, writer, records) -> tuple[Rollouts, dict[int, float]]:
    """The rollouts in the reward model's tokens, and 1 for each row that was cut."""
    group, pad = rollouts.group_size, int(writer.tables.pad)
    truncated = local_rows(rollouts.truncated)
    known = {at: records(*at) for at in {(row.source, row.record) for row in rows.values()}}
    prompts, completions, cut = {}, {}, {}
    for index, row in rows.items():
        ids, start = writer.write(
            known[row.source, row.record], row.completion, bool(truncated[index])
        )
        prompt, completion = ids[:start], ids[start:]
        prompts.setdefault(index // group, prompt[-writer.max_prompt :])
        completions[index] = completion[: writer.max_tokens]
        cut[index] = float(len(prompt) > writer.max_prompt or len(completion) > writer.max_tokens)
    before = _pad(prompts, writer.max_prompt, pad, left=True)
    after = _pad(completions, writer.max_tokens, pad, left=False)
    ends = {i: mark_host_step_ends(*pair, writer.tables) for i, pair in after.items()}
    flags = {i: np.asarray(bool(truncated[i]) or cut[i] > 0) for i in after}
    none = {i: np.zeros(writer.max_tokens, np.float32) for i in after}
    old, rows_like = rollouts.prompts, rollouts.tokens
    translated_prompts = Prompts(
        tokens=_array({i: t for i, (t, _) in before.items()}, old.tokens),
        mask=_array({i: m for i, (_, m) in before.items()}, old.tokens),
        record=old.record,
        source=old.source,
        draw=old.draw,
    )
    blank = _array(none, rows_like)
    return Rollouts(
        prompts=translated_prompts,
        tokens=_array({i: t for i, (t, _) in after.items()}, rows_like),
        mask=_array({i: m for i, (_, m) in after.items()}, rows_like),
        step_ends=_array(ends, rows_like),
        logprobs=blank,
        behaviour_logprobs=blank,
        truncated=_array(flags, rollouts.truncated),
        sample=rollouts.sample,
        version=rollouts.version,
    ), cut


def _pad(rows: Mapping[int, list[int]], size: int, pad: int, *, left: bool) -> dict[int, tuple]:
    """(ids, which of them are real) of each row, padded to `size`."""
    padded = {}
    for index, ids in rows.items():
        fill = size - len(ids)
        around = (fill, 0) if left else (0, fill)
        padded[index] = (
            np.pad(np.asarray(ids, np.int32), around, constant_values=pad),
            np.pad(np.ones(len(ids), bool), around),
        )
    return padded


def _array(rows: Mapping[int, np.ndarray], like: Shaped[Array, "B ..."]) -> Array:
    """This process's rows as one array that lies like `like`."""

    def read(index):
        return np.stack([rows[row] for row in range(like.shape[0])[index[0]]])

    if isinstance(like, np.ndarray):
        return jnp.asarray(read((slice(None),)))
    shape = (like.shape[0], *next(iter(rows.values())).shape)
    return jax.make_array_from_callback(shape, like.sharding, read)
