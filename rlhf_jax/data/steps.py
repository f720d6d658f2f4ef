"""Step labels for process reward models, put on the tokens where steps end on devices."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.data.draws import Drawn, Flaw
from rlhf_jax.data.examples import ExampleSource, Row, pad_rows, pick, wordless
from rlhf_jax.data.forms import Form
from rlhf_jax.data.sources import Record, RecordSource
from rlhf_jax.text.steps import BLANK, mark_host_step_ends, split_steps, token_tables
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Steps, TokenTables


class _Solution(NamedTuple):
    row: Row
    labels: list[float | None]  # one per line of the solution; None trains nothing


def step_labels(
    sources: Sequence[RecordSource],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    chat: str | None = None,
    max_length: int,
    seed: int,
    shuffle: bool = True,
    overlong: str = "error",
    steps: str = "steps",
    labels: str = "labels",
    completion: tuple[str, ...] = ("completion", "solution"),
) -> ExampleSource:
    """Batches of `Steps`: solutions with a label in [0, 1] at the end of each step.

    The solution is the list under `steps`, one step a line; without that field, the text under
    `completion`, cut by `split_steps`. `labels` holds one number from 0 to 1 per step, or None for
    a step that trains nothing. A step of several lines has its label at its last line, and blank
    steps are left out with theirs. Where a row is cut (``overlong="truncate"``), the line that was
    cut has no label. A record that has a completion beside its steps must have the same lines in
    both. Solutions without a labelled step are counted, reported and left out.

    Args:
        template, max_length, seed, shuffle, overlong: see `texts`.
        chat: in place of a template, the field that holds the prompt's messages; the solution is
            what the assistant says next. A template that writes visible lines of its own before it
            is an error.
    """
    form = Form(tokenizer, template=template, chat=chat)
    tables = token_tables(tokenizer)

    def encode(record: Record) -> _Solution:
        text, spread = _lines(record, steps, labels, completion)
        if len(spread) > 1 and not tables.ends_step.any():
            raise ValueError("the vocabulary has no line break, so solutions have no steps")
        row = form.written(record, text)
        if len(row.tokens) <= max_length:
            _check_ends(row, len(spread), tables, form)
        return _Solution(row, spread)

    def collate(drawn: Sequence[Drawn]) -> Steps:
        found: list[_Solution] = [one.encoded for one in drawn]
        texts = pad_rows([one.row for one in found], max_length, tokenizer.pad_id)
        prompt = np.array([one.row.prompt for one in found]).reshape(-1, 1)
        solution = texts.mask & (np.arange(max_length)[None] >= prompt)
        marked = mark_host_step_ends(texts.tokens, solution, tables)
        ends, values = np.zeros(marked.shape, bool), np.zeros(marked.shape, np.float32)
        for index, one in enumerate(found):
            columns = np.flatnonzero(marked[index]).tolist()
            if len(one.row.tokens) > max_length:
                columns = columns[:-1]  # the end of the row, not of a step
            for column, label in zip(columns, one.labels, strict=False):
                if label is not None:
                    ends[index, column], values[index, column] = True, label
        return Steps(texts=texts, step_ends=ends, labels=values)

    return ExampleSource(
        sources,
        encode,
        lambda solution: len(solution.row.tokens),
        collate,
        max_length=max_length,
        seed=seed,
        shuffle=shuffle,
        overlong=overlong,
        flaw=functools.partial(_flaw, max_length, tokenizer.eos_ids),
    )


def _flaw(max_length: int, eos_ids: Sequence[int], solution: _Solution) -> Flaw | None:
    """What is wrong with a solution."""
    if all(label is None for label in solution.labels):
        return Flaw("solutions without a labelled step", useless=True)
    return wordless(solution.row, max_length, eos_ids)


def _lines(
    record: Record, steps: str, labels: str, completion: tuple[str, ...]
) -> tuple[str, list[float | None]]:
    """The text of a record's solution and one label per line of it, at least one."""
    listed = steps in record
    given = _listed(record, steps) if listed else split_steps(pick(record, completion))
    known = _read_labels(record, labels, len(given))
    found = [pair for pair in zip(given, known, strict=True) if pair[0].strip(BLANK)]
    text = "\n".join(step for step, _ in found) if listed else pick(record, completion)
    if listed and completion[0] in record:
        check_joined(text, pick(record, completion[:1]), steps, completion[0])
    spread: list[float | None] = []
    for step, label in found:
        spread += [None] * (len(split_steps(step)) - 1) + [label]
    return text, spread or [None]


def _check_ends(row: Row, lines: int, tables: TokenTables, form: Form) -> None:
    """Raises a ValueError unless a row's tokens end as many steps as its solution has lines."""
    tokens = np.array([row.tokens], np.int32)
    ends = mark_host_step_ends(tokens, np.arange(tokens.shape[1])[None] >= row.prompt, tables)
    if int(ends.sum()) != lines:
        raise ValueError(
            f"{lines} lines but tokens mark {int(ends.sum())} ends; a token holds several lines"
            + (", or the chat template writes lines of its own" if form.chat else "")
        )


def _listed(record: Record, name: str) -> list[str]:
    """The steps of a record, as texts."""
    given = record[name]
    if not isinstance(given, list | tuple) or not all(isinstance(step, str) for step in given):
        raise ValueError(f"field {name!r} holds {given!r}, not a list of texts")
    return list(given)


def check_joined(text: str, whole: str, steps: str, completion: str) -> None:
    """Raises a ValueError unless both have the same lines, up to blank ones and blanks around."""
    ours, theirs = (
        [line.strip(BLANK) for line in split_steps(one) if line.strip(BLANK)]
        for one in (text, whole)
    )
    for number, (one, other) in enumerate(itertools.zip_longest(ours, theirs), 1):
        if one != other:
            raise ValueError(
                f"{steps} do not join to {completion}: line {number} is {one!r} in one and "
                f"{other!r} in the other"
            )


def _read_labels(record: Record, name: str, count: int) -> list[float | None]:
    """The labels of a record's `count` steps."""
    if name not in record:
        raise ValueError(f"no field {name}; the record has {', '.join(record)}")
    values = record[name]
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} hold {values!r}, not a list of a number per step")
    if len(values) != count:
        raise ValueError(f"{len(values)} {name} for {count} steps")
    for value in values:
        good = isinstance(value, bool | int | float) and 0 <= value <= 1
        if value is not None and not good:
            raise ValueError(f"{name} hold {value!r}, not a number from 0 to 1")
    return [None if value is None else float(value) for value in values]
