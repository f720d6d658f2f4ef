"""Supervised rows: a prompt and a completion as one right-padded row, in batches of any kind."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.draws import Drawn, Draws, Flaw, Select
from rlhf_jax.data.sources import Record, RecordSource
from rlhf_jax.text.tokenizer import Tokenizer, encode_start
from rlhf_jax.types import Labelled, Pairs, Steps, Texts

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """Token ids of a prompt, its completion and end-of-text; `prompt` counts the prompt's.

    `trains` says of each token whether the loss is on it; None: on all behind the prompt.
    """

    tokens: list[int]
    prompt: int
    trains: list[bool] | None = None


class Judged(NamedTuple):
    """A row and P(it is right)."""

    row: Row
    label: float


class ExampleSource:
    """Batches of one kind of supervised data: a pure function of (seed, position).

    Made by `texts`, `verdicts`, `pairs`, `correctness` and `step_labels`.

    Args:
        sources, encode, length, seed, shuffle, overlong, select, flaw: see `Draws`.
        collate: drawn records -> one batch.
        max_length: S, in tokens.
    """

    def __init__(
        self,
        sources: Sequence[RecordSource],
        encode: Callable[[Record], Any],
        length: Callable[[Any], int],
        collate: Callable[[Sequence[Drawn]], Texts | Pairs | Labelled | Steps],
        *,
        max_length: int,
        seed: int,
        shuffle: bool,
        overlong: str,
        select: Select | None = None,
        flaw: Callable[[Any], Flaw | None] | None = None,
    ):
        self._collate = collate
        self._draws = Draws(
            sources,
            encode,
            length,
            limit=max_length,
            limit_name="max_length",
            overlong=overlong,
            seed=seed,
            shuffle=shuffle,
            select=select,
            flaw=flaw,
        )

    def __len__(self) -> int:
        """Records per epoch, without those that were skipped."""
        return len(self._draws)

    @property
    def num_overlong(self) -> int:
        """How many records were longer than `max_length`."""
        return self._draws.num_overlong

    @property
    def num_flaws(self) -> dict[str, int]:
        """How many of the records that fit have each flaw."""
        return self._draws.num_flaws

    @property
    def total(self) -> int:
        """Records of all sources, drawn or not: `Pairs.record` is below."""
        return self._draws.total

    def check_prompts(self) -> None:
        """Raises a ValueError that names the first drawn record with a row without prompt; see
        `check_prompt`."""

        def test(encoded: Any) -> None:
            for row in [encoded] if isinstance(encoded, Row) else encoded:
                if isinstance(row, Row):
                    check_prompt(row)

        self._draws.check(test)

    def reordered(self, seed: int) -> "ExampleSource":
        """The same records in the order of another seed."""
        other = copy.copy(self)
        other._draws = self._draws.reordered(seed)
        return other

    def batch(self, position: int, rows: slice, n: int) -> Texts | Pairs | Labelled | Steps:
        """The rows `rows` of the batch of `n` records after `position` draws.

        The next batch is at ``position + n``. Different processes ask for different rows of the
        same batch.
        """
        return self._collate(self._draws.get(position, rows, n))


def check_prompt(row: Row) -> None:
    """Raises a ValueError for a row without a token of a prompt, where an advantage model reads it.

    What it expects of a prompt it says at the prompt's last token. Without one it would be read at
    the answer's first token, and so would have seen the answer.
    """
    if not row.prompt:
        raise ValueError(
            "the prompt has no tokens, and an advantage model says how much better an answer is "
            "than its prompt's others; give prompt and completion, or leave the record out"
        )


def first_field(record: Record, fields: tuple[str, ...]) -> str:
    """The name of the first of `fields` that the record has.

    Raises:
        ValueError: it has none of them.
    """
    for name in fields:
        if name in record:
            return name
    raise ValueError(f"no field {' or '.join(fields)}; the record has {', '.join(record)}")


def pick(record: Record, fields: tuple[str, ...]) -> str:
    """The text of the first of `fields` that the record has.

    Raises:
        ValueError: it has none of them, or no text there.
    """
    name = first_field(record, fields)
    if not isinstance(record[name], str):
        kind = type(record[name]).__name__
        raise ValueError(f"field {name!r} holds {kind} where text is wanted")
    return record[name]


def share(record: Record, fields: tuple[str, ...]) -> float:
    """The label in [0, 1] under the first of `fields` that the record has; true is 1.

    Raises:
        ValueError: it has none of them, or something else there.
    """
    for name in fields:
        if name in record:
            value = record[name]
            if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
                raise ValueError(f"field {name!r} holds {value!r}, not a label from 0 to 1")
            return float(value)
    raise ValueError(f"no field {' or '.join(fields)}; the record has {', '.join(record)}")


def encode_row(
    tokenizer: Tokenizer, prompt: str, completion: str, *, truncated: bool = False
) -> Row:
    """Prompt and completion encoded apart, as the sampler sees them, and end-of-text.

    Args:
        truncated: the completion is cut off and has no end-of-text, like a rollout that ran into
            its token limit.
    """
    start = encode_start(tokenizer, prompt)
    end = [] if truncated else [tokenizer.eos_ids[0]]
    return Row([*start, *tokenizer.encode(completion), *end], len(start))


def number(record: Record, name: str, default: float) -> float:
    """The finite number, 0 or more, under ``name``; `default` where the record has no such field.

    Raises:
        ValueError: it holds something else.
    """
    value = record.get(name, default)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or value < 0:
        raise ValueError(f"field {name!r} holds {value!r}, not a finite number of 0 or more")
    return float(value)


def warn_of_one_class(found: Iterator[Judged]) -> Sequence[int]:
    """All of them; says so where right and wrong cannot be told apart by learning."""
    right = [judged.label > 0.5 for judged in found]
    if len(set(right)) == 1:
        kind = "right" if right[0] else "not right"
        _log.warning("all of %d completions are %s: one class only", len(right), kind)
    return range(len(right))


def wordless(row: Row, max_length: int, eos_ids: Sequence[int]) -> Flaw | None:
    """What is wrong with a row whose completion says nothing within `max_length` tokens.

    With nothing but end-of-text behind the prompt it is an answer all the same. Without even
    that (it was cut off, or the prompt fills the row) there is no token to judge.
    """
    said = row.tokens[row.prompt : max_length]
    if not said:
        return Flaw("no token of a completion within max_length", useless=True)
    return Flaw("empty completions", useless=False) if set(said) <= set(eos_ids) else None


def flag(record: Record, name: str) -> bool:
    """The true or false under ``name``; False where the record has no such field.

    Raises:
        ValueError: it holds something else.
    """
    if not isinstance(record.get(name, False), bool):
        raise ValueError(f"field {name!r} holds {record[name]!r}, not true or false")
    return record.get(name, False)


def pad_rows(rows: Sequence[Row], max_length: int, pad: int) -> Texts:
    """Rows cut and right-padded to `max_length`. The loss is on completions and end-of-text, or on
    what a row says that trains, but never on column 0, which nothing predicts."""
    tokens = np.full((len(rows), max_length), pad, np.int32)
    length = np.array([len(row.tokens) for row in rows], np.int32).reshape(-1, 1)
    prompt = np.array([row.prompt for row in rows], np.int32).reshape(-1, 1)
    for index, row in enumerate(rows):
        kept = row.tokens[:max_length]
        tokens[index, : len(kept)] = kept
    column = np.arange(max_length)[None]
    mask = column < length
    trains = column >= np.maximum(prompt, 1)
    for index, row in enumerate(rows):
        if row.trains is not None:
            kept = row.trains[:max_length]
            trains[index, : len(kept)] &= np.array(kept, bool)
    return Texts(
        tokens=tokens,
        mask=mask,
        loss_mask=mask & trains,
        segment=mask.astype(np.int32),
    )
