"""Records of published files: JSONL, JSON arrays and Parquet, as data sets come from their hubs."""

import gzip
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import pyarrow
import pyarrow.parquet

from rlhf_jax.data.sources import MappedSource, Record, RecordSource, open_source

KINDS = ("jsonl", "json", "parquet", "tfds", "inline")


class FileSource:
    """Records of one file that know their place in it."""

    def __init__(self, path: str, records: list[Record]):
        self._path, self._records = path, records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Record:
        return self._records[index]

    def place(self, index: int) -> str:
        """File and number of a record, for messages."""
        return f"{self._path}, record {index}"


def open_records(
    name: str,
    split: str = "all",
    *,
    data_dir: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> RecordSource:
    """The records that a name stands for: those of `open_source`, and two more kinds of file.

    * ``"json:<path>"``: one JSON array of objects (``.json`` or ``.json.gz``), or an object with
      one array of objects in it.
    * ``"parquet:<path>"``: a Parquet file, or a folder of them in the order of their names; None
      stands for a field without a value. Both with the options `fields` and `format` of
      `MappedSource`.

    Raises:
        ValueError: see `open_source`; a file that is absent, broken or empty.
    """
    kind, _, path = name.partition(":")
    if kind not in ("json", "parquet"):
        return open_source(name, split, data_dir=data_dir, options=options)
    values = dict(options or {})
    unknown = sorted(set(values) - {"fields", "format"})
    if unknown:
        raise ValueError(
            f"options: {kind} files have no option {', '.join(unknown)}; they have fields, format"
        )
    found = _json(pathlib.Path(path)) if kind == "json" else _parquet(pathlib.Path(path))
    if not found:
        raise ValueError(f"{path} holds no records")
    source = FileSource(path, found)
    if not values:
        return source
    return MappedSource(
        source, fields=values.get("fields", {}), format=values.get("format", "plain")
    )


def _json(path: pathlib.Path) -> list[Record]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            value = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: not JSON ({error}); for one object a line, name it jsonl:{path}"
        ) from error
    arrays = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    rows = arrays[0] if len(arrays) == 1 else value
    if not isinstance(rows, list):
        raise ValueError(f"{path}: {type(value).__name__}; wanted one array of objects")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, record {number}: {type(row).__name__}; wanted an object")
    return rows


def _parquet(path: pathlib.Path) -> list[Record]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: no such file" if not path.is_dir() else f"{path}: no *.parquet")
    rows: list[Record] = []
    for file in files:
        try:
            rows += pyarrow.parquet.ParquetFile(file).read().to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: cannot be read as Parquet ({error})") from error
    return rows
