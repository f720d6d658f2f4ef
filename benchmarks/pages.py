"""What the programs share that write pages of results: reading summaries, Markdown tables."""

import datetime
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Numbers = Mapping[str, Any]


def read(path: pathlib.Path) -> Numbers:
    """A summary.json."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: pathlib.Path) -> list[Numbers]:
    """A file of one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(numbers: Numbers, name: str, digits: int = 3) -> str:
    """ "0.512 (0.490 to 0.534)"; the value alone where there is no interval."""
    value = f"{numbers[name]:.{digits}f}"
    if f"{name}_low" not in numbers:
        return value
    return f"{value} ({numbers[f'{name}_low']:.{digits}f} to {numbers[f'{name}_high']:.{digits}f})"


def machine_and_versions(summary: Numbers) -> str:
    """ "1 x cpu, Python 3.11.7, jax 0.10.2" of a run's summary."""
    versions = summary["versions"]
    return f"{summary['devices']}, Python {summary['python']}, jax {versions['jax']}"


def last_day(paths: Iterable[pathlib.Path]) -> datetime.date:
    """The day (UTC) on which the newest of these files was written."""
    last = max(path.stat().st_mtime for path in paths)
    return datetime.datetime.fromtimestamp(last, datetime.UTC).date()
