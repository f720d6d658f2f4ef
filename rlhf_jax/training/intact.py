"""Whether the files of a saved state are all there and long enough, without reading the arrays.

Orbax writes a state as an OCDBT database: a tree whose nodes say in which file, at which byte and
how long every chunk of every array lies. Nodes carry checksums; chunks do not, so this finds what
an interrupted copy or a full disk leaves behind, and not a bit that was flipped in an array.
"""

import pathlib
from typing import Any

import tensorstore as ts


def why_broken(state: pathlib.Path) -> str:
    """Why the database in ``state`` cannot be read whole; empty if its files are long enough."""
    base = ts.KvStore.open({"driver": "file", "path": f"{state}/"}).result()
    try:
        versions = ts.ocdbt.dump(base).result()["versions"]
        todo = [versions[-1]["root"].get("location", "")]
        while todo:
            kind, _, place = todo.pop().partition(":")
            if kind == "value":
                reason = _why_short(state, place)
                if reason:
                    return reason
            elif kind == "btreenode":
                todo += _references(ts.ocdbt.dump(base, f"{kind}:{place}").result())
    except ValueError as error:  # what TensorStore raises for whatever it cannot read
        return str(error).partition(" [")[0]
    return ""


def _references(node: dict[str, Any]) -> list[str]:
    """What the entries of a node refer to: other nodes, or chunks outside of the tree."""
    keys = ("location", "indirect_value")
    return [entry[key] for entry in node["entries"] for key in keys if key in entry]


def _why_short(state: pathlib.Path, place: str) -> str:
    """Checks a chunk: "<folder>/:<file>:<offset>:<length>"."""
    name, offset, length = place.rsplit(":", 2)
    file, end = state / name.replace(":", "", 1), int(offset) + int(length)
    if not file.is_file():
        return f"{file.relative_to(state)} is absent"
    size = file.stat().st_size
    return f"{file.relative_to(state)} ends at byte {size} of {end}" if size < end else ""
