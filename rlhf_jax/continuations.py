"""Continuations of prefixes, in batches of few shapes: is each of them right?

A prefix is a prompt to the sampler: it is prefilled once, and its N continuations read what the
prefill left where it lies: the cache holds it once. Prefixes of similar length share a batch, whose
width is one of a few.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.data.prompts import pad_left
from rlhf_jax.judge import Judge
from rlhf_jax.mesh import fetch_host
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.step_solutions import Solution
from rlhf_jax.text.steps import mark_host_step_ends, mark_step_ends
from rlhf_jax.token_lines import padded
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.types import Array, Prompts, Rollouts, TokenTables

Lines = list[dict[str, Any]]


class Prefix(NamedTuple):
    """A solution's first ``step`` + 1 steps."""

    solution: Solution
    step: int

    @property
    def given(self) -> list[int]:
        """The tokens of the solution that it holds."""
        return self.solution.tokens[: self.solution.ends[self.step]]

    @property
    def length(self) -> int:
        """Tokens of prompt and steps."""
        return len(self.solution.problem.prompt) + self.solution.ends[self.step]


class Batch(NamedTuple):
    """Prefixes that are continued together, padded to ``width`` tokens."""

    width: int
    prefixes: Sequence[Prefix]


class Shapes(NamedTuple):
    """Of what is judged: rows of a batch, tokens of a prompt, tokens of a solution."""

    rows: int
    prompt: int
    solution: int


def choose_widths(lengths: Iterable[int], limit: int, most: int) -> list[int]:
    """Up to ``most`` widths, ascending, to which rows of these lengths are padded with the least
    padding in all; each is one of `token_lines.padded`, at most ``limit``.

    By dynamic programming over the widths that occur: W widths of which the k-th is the largest
    cost the best k − 1 below any of them and the rows between.
    """
    counts: dict[int, int] = {}
    for length in lengths:
        width = min(padded(length), limit)
        counts[width] = counts.get(width, 0) + 1
    known = sorted(counts)
    total = list(itertools.accumulate((counts[width] for width in known), initial=0))
    # best[i]: (tokens, widths) for the i narrowest, with as many widths as rounds so far
    best: list[tuple[float, list[int]]] = [(0, [])] + [(float("inf"), [])] * len(known)
    for _ in range(min(most, len(known))):
        before = list(best)
        for i, width in enumerate(known, 1):
            options = [(before[j][0] + (total[i] - total[j]) * width, j) for j in range(i)]
            cost, j = min(options)
            if cost < best[i][0]:
                best[i] = (cost, [*before[j][1], width])
    return best[-1][1]


def plan_batches(prefixes: Sequence[Prefix], *, rows: int, limit: int, most: int) -> list[Batch]:
    """Batches of ``rows`` prefixes or fewer, the widest first: too little memory shows at once.

    Args:
        limit: tokens of a prefix; of a longer one the last are kept.
        most: how many widths there may be.
    """
    widths = choose_widths((one.length for one in prefixes), limit, most)
    groups: dict[int, list[Prefix]] = {width: [] for width in reversed(widths)}
    for one in prefixes:
        fits = next(width for width in widths if width >= min(one.length, limit))
        groups[fits].append(one)
    return [
        Batch(width, group[first : first + rows])
        for width, group in groups.items()
        for first in range(0, len(group), rows)
    ]


def whole(
    prompts: Prompts,
    given: Int[Array, "N W"],
    mask: Bool[Array, "N W"],
    drawn: Rollouts,
    tables: TokenTables,
) -> Rollouts:
    """Continuations as completions of the prompts themselves: W + T columns, ``given`` first.

    Log-probs are 0 where nothing was drawn.

    Args:
        given: the tokens of each prefix behind its prompt, right-padded.
        drawn: the continuations of the prefixes.
    """
    k, width = drawn.group_size, given.shape[1]
    given, mask = jnp.repeat(given, k, axis=0), jnp.repeat(mask, k, axis=0)
    before = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)
    after = jnp.sum(drawn.mask, axis=1, keepdims=True, dtype=jnp.int32)
    column = jax.lax.broadcasted_iota(jnp.int32, (given.shape[0], width + drawn.mask.shape[1]), 1)
    place = jnp.where(column < before, column, column - before + width)
    filled = column < before + after

    def join(first, second, padding):
        both = jnp.concatenate([first, second.astype(first.dtype)], axis=1)
        moved = jnp.take_along_axis(both, jnp.minimum(place, both.shape[1] - 1), axis=1)
        return jnp.where(filled, moved, padding)

    tokens = join(given, drawn.tokens, jnp.asarray(tables.pad, given.dtype))
    none = jnp.zeros(given.shape, jnp.float32)
    return Rollouts(
        prompts=prompts,
        tokens=tokens,
        mask=filled,
        step_ends=mark_step_ends(tokens, filled, jax.tree.map(jnp.asarray, tables)),
        logprobs=join(none, drawn.logprobs, 0.0),
        behaviour_logprobs=join(none, drawn.behaviour_logprobs, 0.0),
        truncated=drawn.truncated,
        sample=drawn.sample,
        version=drawn.version,
    )


def _fill(rows: Sequence[Any], count: int) -> list[Any]:
    """``count`` rows, the last one again and again: no shape of its own, no row that never ends."""
    return [*rows, *[rows[-1]] * (count - len(rows))]


def _prompts(solutions: Sequence[Solution], width: int, pad: int) -> Prompts:
    """The problems of solutions, whose records a reward looks up."""
    tokens, mask = pad_left([one.problem.prompt for one in solutions], width, pad)
    return Prompts(
        tokens=tokens,
        mask=mask,
        record=np.array([one.problem.record for one in solutions], np.int32),
        source=np.array([one.problem.source for one in solutions], np.int32),
        draw=np.zeros(len(solutions), np.int32),
    )


def _pad_right(
    rows: Sequence[Sequence[int]], width: int, pad: int
) -> tuple[Int[np.ndarray, "N W"], Bool[np.ndarray, "N W"]]:
    """Token rows filled up on the right, and where they lie."""
    tokens = np.full((len(rows), width), pad, np.int32)
    mask = np.arange(width)[None] < np.array([len(row) for row in rows])[:, None]
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, mask


class Continuer:
    """Draws and judges: what comes out are counts and verdicts, no texts.

    Args:
        right_above: a completion is right where its score is above this, and it ended.
    """

    def __init__(
        self,
        sampler: PolicySampler,
        judge: Judge,
        shapes: Shapes,
        *,
        seed: int,
        right_above: float | int,
    ):
        self._sampler, self._judge, self._shapes = sampler, judge, shapes
        self._seed, self._right_above = seed, right_above
        self._whole = jax.jit(whole)

    def outcomes(self, batches: Iterable[Batch]) -> Iterator[Lines]:
        """For each batch a line for each prefix: its solution, its step, how many tokens were
        drawn, and 1 for each continuation that is right, else 0.

        The devices draw a batch while the host judges the one before.
        """
        yield from _one_ahead(batches, self._draw, self._count)

    def verdicts(self, solutions: Sequence[Solution]) -> Lines:
        """Whether each solution, as it stands, is right."""
        filled = _fill(solutions, self._shapes.rows)
        pad, rows = self._sampler.text.pad_id, len(filled)
        tokens, mask = _pad_right([one.tokens for one in filled], self._shapes.solution, pad)
        none = np.zeros(mask.shape, np.float32)
        rollouts = Rollouts(
            prompts=_prompts(filled, self._shapes.prompt, pad),
            tokens=tokens,
            mask=mask,
            step_ends=mark_host_step_ends(tokens, mask, self._sampler.tables),
            logprobs=none,
            behaviour_logprobs=none,
            truncated=np.array([not one.ended for one in filled]),
            sample=np.zeros(rows, np.int32),
            version=np.zeros(rows, np.int32),
        )
        right = self._right(self._sampler.place(rollouts))
        found = zip(solutions, right.tolist(), strict=False)
        return [{"solution": one.index, "right": int(verdict)} for one, verdict in found]

    def _draw(self, batch: Batch) -> Rollouts:
        """Whole solutions, one for each continuation, on the devices."""
        prefixes = _fill(batch.prefixes, self._shapes.rows)
        solutions, pad = [one.solution for one in prefixes], self._sampler.text.pad_id
        rows = [one.solution.problem.prompt + one.given for one in prefixes]
        tokens, mask = pad_left(rows, batch.width, pad)
        # Noise is counted by solution and step: neither the batch nor its order has a say.
        counted = Prompts(
            tokens=tokens,
            mask=mask,
            record=np.array([one.index for one in solutions], np.int32),
            source=np.zeros(len(rows), np.int32),
            draw=np.array([one.step for one in prefixes], np.int32),
        )
        place, key = self._sampler.place, step_key(self._seed, Purpose.CONTINUE, 0)
        drawn = self._sampler.complete(place(counted), key)
        given = _pad_right([one.given for one in prefixes], self._shapes.solution, pad)
        prompts = _prompts(solutions, self._shapes.prompt, pad)
        return self._whole(place(prompts), *place(given), drawn, self._sampler.tables)

    def _count(self, batch: Batch, rollouts: Rollouts) -> Lines:
        right = self._right(rollouts)
        lengths = fetch_host(rollouts.mask).sum(axis=1)
        k, lines = rollouts.group_size, []
        for i, one in enumerate(batch.prefixes):
            rows = slice(i * k, (i + 1) * k)
            drawn = int(lengths[rows].sum()) - k * len(one.given)
            right_ones = right[rows].astype(int).tolist()
            lines.append(
                dict(solution=one.solution.index, step=one.step, tokens=drawn, right=right_ones)
            )
        return lines

    def _right(self, rollouts: Rollouts) -> Bool[np.ndarray, " B"]:
        ended = ~fetch_host(rollouts.truncated)
        return (self._judge(rollouts) > self._right_above) & ended


def _one_ahead(
    items: Iterable[Any], start: Callable[[Any], Any], finish: Callable[[Any, Any], Any]
) -> Iterator[Any]:
    """``finish(item, start(item))`` of every item, where the next one is started before."""
    waiting: list[Any] = []
    for item in items:
        waiting.append((item, start(item)))
        if len(waiting) > 1:
            yield finish(*waiting.pop(0))
    if waiting:
        yield finish(*waiting.pop())


def outcomes_of(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int], list[int]]:
    """Outcomes by solution and step."""
    return {(line["solution"], line["step"]): line["right"] for line in lines}
