"""Lines of a JSONL file as rows of tokens, in batches of few shapes, and results in their order.

For programs that go through a file of prompts or texts. The file is read twice, once to check every
line before a device is touched and once in windows, so that it need not fit in memory.
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from rlhf_jax.data.examples import Row
from rlhf_jax.data.forms import Form
from rlhf_jax.data.sources import Record, read_lines
from rlhf_jax.schema import within
from rlhf_jax.text.chat_template import read_messages
from rlhf_jax.text.tokenizer import Tokenizer

PLAIN = "{prompt}"  # the template that adds nothing
_FORMS = ("tokens", "messages", "prompt")  # how a line may hold its prompt
_WINDOW = 64  # batches that are sorted by length together
_STEP = 16  # tokens; finer shapes would cost more compilation than they save

Encode = Callable[[Record], Row]


class Line(NamedTuple):
    """One line of a file: its number among the records, its fields and its tokens."""

    index: int
    record: Record
    row: Row


Run = Callable[[list[Line], int], list[dict[str, Any]]]


def check_counts(**counts: int) -> None:
    """Raises a ValueError naming the first flag that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"--{name}={count}; wanted 1 or more")


def check_output(output: str, overwrite: bool) -> None:
    """Raises a ValueError if a file cannot be written there, or may not be."""
    path = pathlib.Path(output)
    if path.is_dir():
        raise ValueError(f"--output={output!r} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"--output={output!r}: there is no folder {path.parent}; make it first")
    if path.suffix == ".gz":
        raise ValueError(f"--output={output!r}: lines are written as they are, not as .gz")
    if path.exists() and not overwrite:
        raise ValueError(f"--output={output!r} exists; name another file or set --overwrite")


def read_rows(path: str, encode: Encode) -> Iterator[Line]:
    """The lines of a file, one after the other.

    Raises:
        ValueError: naming file and line, where a line is broken or ``encode`` refuses it.
    """
    for index, (number, record) in enumerate(read_lines(path)):
        with within(f"{path}, line {number}"):
            row = encode(record)
        yield Line(index, record, row)


def count_rows(path: str, encode: Encode, widest: float | int = math.inf) -> int:
    """How many lines the file has.

    Args:
        widest: how many tokens of a row the model has room for.

    Raises:
        ValueError: see `read_rows`; also for a file without lines, or a row that is too long.
    """
    count = 0
    for line in read_rows(path, encode):
        count += 1
        if len(line.row.tokens) > widest:
            raise ValueError(
                f"{path}, record {count} has {len(line.row.tokens)} tokens, and the positions that "
                f"the model learned have room for {widest}"
            )
    return count


class Encoder:
    """From records to the tokens of their prompts, and of prompts with completions.

    A prompt is ``template`` filled with the record's fields. Without a template it is whichever the
    record has of ``tokens`` (ids), ``messages`` (a dialogue, through the tokenizer's chat template)
    and ``prompt`` (text).

    Args:
        vocab_size: of the model; ids are below it.
    """

    def __init__(self, text: Tokenizer, vocab_size: int, template: str = PLAIN):
        self._text, self._vocab_size, self._template = text, vocab_size, template
        self._plain = Form(text, template=template, chat=None)
        # Only dialogues need a chat template.
        self._chat = functools.cache(lambda: Form(text, template=None, chat="messages"))

    def prompt(self, record: Record) -> list[int]:
        """The tokens of a record's prompt.

        Raises:
            ValueError: naming the fields that are missing, at odds, or hold something else; the
                prompt has no tokens.
        """
        form = self._form(record)
        return self._ids(record) if form is None else form.prompt(record)

    def text(self, record: Record, *, ended: bool) -> Row:
        """The tokens of a record's prompt and ``completion``, or of its ``tokens``, which count as
        a completion without prompt. An answer that ends ``messages`` is their completion.

        Args:
            ended: an end-of-text token closes the completion.

        Raises:
            ValueError: as `prompt`.
        """
        form = self._form(record)
        if "completion" not in record and form is not None and form.chat:
            record = _answered(record)
        if "completion" in record and form is not None:
            row = form.row(record, ("completion",), truncated=not ended)
            if not row.prompt:
                raise ValueError("the prompt is empty: nothing says how likely the first token is")
            return row
        if "completion" in record:
            raise ValueError("the record has tokens and completion; wanted only one of them")
        if form is not None:
            raise ValueError(
                "no field completion beside the prompt, nor tokens; the record has "
                f"{', '.join(record)}"
            )
        return Row(self._ids(record), 0)

    def _form(self, record: Record) -> Form | None:
        """How the record's prompt is written; None where it stands in ``tokens``."""
        if self._template != PLAIN:
            return self._plain
        there = [name for name in _FORMS if name in record]
        if "tokens" in there and len(there) > 1:
            raise ValueError(f"the record has {' and '.join(there)}; wanted tokens or the others")
        if not there:
            raise ValueError(
                f"no field {' or '.join(_FORMS)}; the record has {', '.join(record) or 'none'}; "
                "--template makes a prompt of other fields"
            )
        if "tokens" in there:
            return None
        return self._chat() if "messages" in there else self._plain

    def _ids(self, record: Record) -> list[int]:
        """The ids in the field ``tokens``."""
        ids = record["tokens"]
        if not isinstance(ids, list) or not ids:
            kind = "an empty list" if ids == [] else type(ids).__name__
            raise ValueError(f"field 'tokens' holds {kind} where a list of token ids is wanted")
        for column, token in enumerate(ids):
            whole = isinstance(token, int) and not isinstance(token, bool)
            if not whole or not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"field 'tokens' holds {token!r} at index {column}; wanted ids of the model, "
                    f"from 0 to {self._vocab_size - 1}"
                )
        return ids


def _answered(record: Record) -> Record:
    """A record with the last of its messages as the completion, if it is the assistant's."""
    messages = read_messages(record["messages"], "messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return record
    return record | {"messages": messages[:-1], "completion": messages[-1:]}


def padded(length: int) -> int:
    """The width to which a row of so many tokens is padded: 16, 32, 48, 64, 96, 128, 192, ...

    Two widths for each power of two: few programs to compile and little padding.
    """
    step = max(_STEP, 1 << max(0, (length - 1).bit_length() - 2))
    return -(-length // step) * step


def batch_rows(batch: int, count: int, shards: int) -> int:
    """Rows of a batch: ``batch``, or all lines where these are fewer, up to whole shards."""
    return -(-min(batch, count) // shards) * shards


def in_order(
    path: str, encode: Encode, run: Run, *, rows: int, count: int, widest: float | int = math.inf
) -> Iterator[dict[str, Any]]:
    """What ``run`` says of each line with the line's other fields, in the order of the file.

    Args:
        run: gets ``rows`` lines and the width to which they are padded. Where there are fewer, the
            last line stands several times: no shape of its own, and no row that never ends.
        count: lines of the file, for the progress bar.
        widest: to how many tokens rows are padded at most.
    """
    lines = read_rows(path, encode)
    with tqdm(total=count, unit="line") as bar:
        while window := list(itertools.islice(lines, rows * _WINDOW)):
            found: dict[int, dict[str, Any]] = {}
            for width, group in _by_width(window, widest):
                for first in range(0, len(group), rows):
                    part = group[first : first + rows]
                    said = run(part + part[-1:] * (rows - len(part)), width)
                    found |= {line.index: one for line, one in zip(part, said, strict=False)}
                    bar.update(len(part))
            for line in window:
                yield line.record | found[line.index]


def _by_width(window: list[Line], widest: float | int) -> list[tuple[int, list[Line]]]:
    """The lines of each padded width, the widest first: too little memory shows at once."""
    groups: dict[int, list[Line]] = {}
    for line in window:
        width = int(min(padded(len(line.row.tokens)), widest))
        groups.setdefault(width, []).append(line)
    return sorted(groups.items(), reverse=True)
