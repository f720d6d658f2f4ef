"""Records by name: the arithmetic task, JSONL files, TFDS sets, or written in the config.

A source is random access: a length and records by index, each a plain dict of Python values.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data import arithmetic
from rlhf_jax.data.builders.arithmetic import prepare
from rlhf_jax.text.template import split_dialogue

Record = dict[str, Any]
FORMATS = ("plain", "dialogue")
HALVES = ("a", "b")


@runtime_checkable
class RecordSource(Protocol):
    """Records by index. A list of dicts is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@runtime_checkable
class PlacedSource(RecordSource, Protocol):
    """Records that know where they stand, such as a line of a file."""

    def place(self, index: int) -> str: ...


class JsonlSource:
    """The records of a JSONL file, and the line that each stands on.

    Raises:
        ValueError: see `read_jsonl`.
    """

    def __init__(self, path: str | os.PathLike):
        found = list(read_lines(path))
        self._path = path
        self._lines = [number for number, _ in found]
        self._records = [record for _, record in found]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Record:
        return self._records[index]

    def place(self, index: int) -> str:
        """File and line of a record, for messages."""
        return f"{self._path}, line {self._lines[index]}"


def place(source: RecordSource, index: int) -> str:
    """Where a record stands, for messages: file and line where the source is a file."""
    return source.place(index) if isinstance(source, PlacedSource) else f"record {index}"


class TfdsSource:
    """The records of a prepared TFDS split, as text and numbers of Python."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Record:
        return _plain(self._records[index])


class MappedSource:
    """Records with fields renamed and dialogues split.

    Args:
        records: the source.
        fields: new name -> name in the source; other fields stay.
        format: "dialogue" splits whole dialogues ``chosen`` and ``rejected`` (HH-RLHF) into
            ``prompt`` and two replies; "plain" leaves texts alone.
    """

    def __init__(self, records: RecordSource, *, fields: Mapping[str, str], format: str):
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
        self._records, self._fields, self._format = records, dict(fields), format

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Record:
        record = self._records[index]
        missing = sorted(set(self._fields.values()) - set(record))
        if missing:
            raise ValueError(
                f"no field {', '.join(missing)}, which options.fields names; the record has "
                f"{', '.join(record)}"
            )
        old = set(self._fields.values())
        kept = {name: value for name, value in record.items() if name not in old}
        kept |= {new: record[name] for new, name in self._fields.items()}
        if self._format == "dialogue":
            names = ("prompt", "chosen", "rejected")
            parts = split_dialogue(kept["chosen"], kept["rejected"])
            kept |= dict(zip(names, parts, strict=True))
        return kept

    def place(self, index: int) -> str:
        """Where a record stands in the source, for messages."""
        return place(self._records, index)


class HalfSource:
    """One of two halves of the records, which have no prompt in common.

    A record's half is a bit of the SHA-256 of its field `by`, so it depends on neither order nor
    number of the records, and those of one prompt stay together: two reward models, one for each
    half, have seen samples of one distribution, and neither a prompt of the other.

    Args:
        records: the source; all records are read.
        half: "a" or "b".
        by: the field that decides, text or messages.
    """

    def __init__(self, records: RecordSource, *, half: str, by: str = "prompt"):
        if half not in HALVES:
            raise ValueError(f"options.half={half!r} is not one of {', '.join(HALVES)}")
        self._records = records
        self._kept = [i for i in range(len(records)) if self._half(i, by) == half]
        if not self._kept:
            raise ValueError(f"options.half={half!r} holds none of the {len(records)} records")

    def _half(self, index: int, by: str) -> str:
        record = self._records[index]
        if by not in record:
            raise ValueError(
                f"{place(self._records, index)}: no field {by}, by which records are halved "
                f"(options.half_by); the record has {', '.join(record)}"
            )
        text = json.dumps(record[by], sort_keys=True)
        return HALVES[hashlib.sha256(text.encode()).digest()[0] & 1]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int, /) -> Record:
        return self._records[self._kept[index]]

    def place(self, index: int) -> str:
        """Where a record stands in the source, for messages."""
        return place(self._records, self._kept[index])


def open_source(
    name: str,
    split: str = "train",
    *,
    data_dir: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> RecordSource:
    """The records that a name stands for.

    * ``"arithmetic"``: generated on first use and kept under `data_dir` (empty or None: a cache
      folder of the user's); options are those of `arithmetic.Options`.
    * ``"jsonl:<path>"``: one JSON object a line, ``.jsonl`` or ``.jsonl.gz``. A ``{split}`` in the
      path is replaced by the split; without one the file is the split "train" or "all". Options
      `fields` and `format` of `MappedSource`, then `half` and `half_by` of `HalfSource`.
    * ``"inline"``: the records stand in the config, as columns of equal length: options
      ``dict(prompt=("a", "b"))`` are two records with one field.
    * ``"tfds:<name>"``: a set that is prepared as ArrayRecord under `data_dir` (empty or None: that
      of TFDS), such as ``tfds:c4/en:3.0.1``; the same options. No code of the set is imported.

    Raises:
        ValueError: unknown name, split or option; a broken line; a set in another file format,
            with the command that converts it as the last line.
    """
    kind, _, rest = name.partition(":")
    values = dict(options or {})
    if name == "arithmetic":
        return _arithmetic(split, data_dir or default_data_dir(), values)
    if name == "inline":
        return _inline(values)
    if kind not in ("jsonl", "tfds") or not rest:
        raise ValueError(
            f"data set {name!r} is neither 'arithmetic', 'jsonl:<path>' nor 'tfds:<name>', nor "
            "'inline'"
        )
    known = ("fields", "format", "half", "half_by")
    unknown = sorted(set(values) - set(known))
    if unknown:
        arithmetic_only = set(unknown) <= {f.name for f in dataclasses.fields(arithmetic.Options)}
        raise ValueError(
            f"options: {kind} sources have no option {', '.join(unknown)}; they have "
            + ", ".join(known)
            + ("; these are of the arithmetic task: set options=dict()" if arithmetic_only else "")
        )
    if kind == "jsonl":
        source: RecordSource = _jsonl(rest, split)
    else:
        source = _tfds(rest, split, data_dir)
    if {"fields", "format"} & set(values):
        source = MappedSource(
            source, fields=values.get("fields", {}), format=values.get("format", "plain")
        )
    if "half_by" in values and "half" not in values:
        raise ValueError(f"options.half_by={values['half_by']!r}, but options.half names no half")
    if "half" in values:
        source = HalfSource(source, half=values["half"], by=values.get("half_by", "prompt"))
    return source


def default_data_dir() -> str:
    """Where generated sets are kept if nobody says: ``$XDG_CACHE_HOME/rlhf_jax``."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return str(pathlib.Path(cache) / "rlhf_jax")


def read_jsonl(path: str | os.PathLike) -> list[Record]:
    """The objects of a JSONL file, gzipped if it ends in ``.gz``; empty lines are passed over.

    Raises:
        ValueError: the file is absent or empty, or a line is no JSON object; names the line.
    """
    return [record for _, record in read_lines(path)]


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, Record]]:
    """The objects of a JSONL file with the numbers of their lines, one after the other.

    Raises:
        ValueError: see `read_jsonl`, when the line is reached.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    opened = gzip.open if path.suffix == ".gz" else open
    number = found = 0
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found += 1
                    yield number, _read_object(f"{path}, line {number}", line)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: cannot be read ({error})") from error
    if not found:
        raise ValueError(f"{path} holds no records")


def _read_object(where: str, line: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): {line.strip()[:60]!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__} where an object is wanted")
    return value


def _arithmetic(split: str, data_dir: str, values: Mapping[str, Any]) -> RecordSource:
    known = [field.name for field in dataclasses.fields(arithmetic.Options)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"options: arithmetic has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    builder = prepare(arithmetic.Options(**values), data_dir)
    return TfdsSource(builder.as_data_source(_known_split(split, builder)))


def _inline(columns: Mapping[str, Any]) -> list[Record]:
    """Records from columns; every field has one value for each of them."""
    wrong = sorted(name for name, column in columns.items() if not isinstance(column, list | tuple))
    lengths = {name: len(column) for name, column in columns.items() if name not in wrong}
    if wrong or not lengths or len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(
            "inline records are columns of equal length, such as options=dict(prompt=('a', 'b')); "
            f"got {lengths or 'no column'}" + (f" and no list in {wrong}" if wrong else "")
        )
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _jsonl(path: str, split: str) -> JsonlSource:
    if "{split}" not in path and split not in ("train", "all"):
        raise ValueError(
            f"{path} is one file, so it has no split {split!r}; write {{split}} into the path, "
            "or name the file of that split"
        )
    return JsonlSource(path.replace("{split}", split))


def _tfds(name: str, split: str, data_dir: str | None) -> TfdsSource:
    root = pathlib.Path(data_dir) if data_dir else pathlib.Path.home() / "tensorflow_datasets"
    folder = _find_prepared(name, root)
    builder = tfds.builder_from_directory(str(folder))
    formats = {builder.info.file_format, *builder.info.alternative_file_formats}
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        # In place: with --out_dir, TFDS 4.9.10 writes shards without metadata and says success.
        raise ValueError(
            f"{folder} is prepared as {builder.info.file_format.value}, which cannot be read at "
            "random. Add ArrayRecord files to the folder (or to a copy of it) once, in an "
            "environment of its own with: pip install tensorflow tensorflow-datasets apache-beam "
            "mlcroissant\n"
            f"tfds convert_format --dataset_version_dir={shlex.quote(str(folder))} "
            "--out_file_format=array_record"
        )
    return TfdsSource(builder.as_data_source(_known_split(split, builder)))


def _find_prepared(name: str, root: pathlib.Path) -> pathlib.Path:
    """The one folder of a prepared set: <root>/<name>[/<config>]/<newest version>."""
    base = root / name.replace(":", "/")
    found = [
        p.parent for depth in ("", "*/", "*/*/") for p in base.glob(depth + "dataset_info.json")
    ]
    if not found:
        raise ValueError(
            f"no prepared data set {name!r} under {root}; set data_dir to the folder that holds it"
        )
    configs = sorted({str(folder.parent.relative_to(root)) for folder in found if folder != base})
    if len(configs) > 1:
        raise ValueError(f"{name!r} is one of {', '.join(configs)}; name it in full")
    return max(found, key=lambda folder: [int(n) for n in folder.name.split(".") if n.isdecimal()])


def _known_split(split: str, builder: tfds.core.DatasetBuilder) -> str:
    """`split`, which may be a slice such as "train[:90%]", if the builder has it."""
    if split.partition("[")[0] not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"{builder.info.full_name} has no split {split!r}; it has {known}")
    return split


def _plain(value: Any) -> Any:
    """Python values of what TFDS decodes: text for bytes, numbers for numpy scalars."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value
