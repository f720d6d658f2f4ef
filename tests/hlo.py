"""Reading the text of a compiled program: computations, buffers, loops, collectives."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# What gives a name to a buffer that exists already.
_NAMES = ("parameter", "get-tuple-element", "tuple", "while", "bitcast", "optimization-barrier")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a computation. ``shapes`` and ``dtypes`` are those of the result, in order."""

    name: str
    opcode: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    line: str

    @property
    def called(self) -> list[str]:
        """The computations that this instruction runs."""
        return [name for group in _CALLED.findall(self.line) for name in _names(group)]

    @property
    def elements(self) -> int:
        """Elements of the largest array in the result."""
        return max((math.prod(shape) for shape in self.shapes), default=0)


def is_fetch(instruction: Instruction) -> bool:
    """Whether this is a part of a transfer into a TPU's fast memory, S(1) in layouts."""
    return instruction.opcode in ("copy-start", "copy-done") and "S(1)" in instruction.line


Computations = Mapping[str, list[Instruction]]


def _names(text: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", text)


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation, by its name."""
    computations: dict[str, list[Instruction]] = {}
    current = None
    for line in text.splitlines():
        start = None if line.startswith(" ") else _COMPUTATION.match(line)
        if start:
            current = computations.setdefault(start.group(1), [])
        elif line.startswith("  ") and current is not None and " = " in line:
            current.append(_instruction(line.strip().removeprefix("ROOT ")))
    return computations


def _instruction(line: str) -> Instruction:
    name, rest = line.split(" = ", 1)
    end = _end_of_type(rest)
    arrays = _ARRAY.findall(rest[:end])
    return Instruction(
        name=name.lstrip("%"),
        opcode=rest[end:].lstrip().split("(", 1)[0],
        shapes=tuple(tuple(_sizes(sizes)) for _, sizes in arrays),
        dtypes=tuple(dtype for dtype, _ in arrays),
        line=line,
    )


def _end_of_type(text: str) -> int:
    """Where the result's type ends: a balanced tuple, or the first space."""
    if not text.startswith("("):
        return text.index(" ")
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced type in {text[:80]!r}")


def reachable(
    computations: Computations, names: Iterable[str], *, into_fusions: bool = True
) -> Iterator[str]:
    """Computations and all that they run, each once."""
    seen, waiting = set(names), list(names)
    while waiting:
        current = waiting.pop()
        yield current
        for instruction in computations[current]:
            if into_fusions or instruction.opcode != "fusion":
                fresh = [callee for callee in instruction.called if callee not in seen]
                seen.update(fresh)
                waiting.extend(fresh)


def loop_with(computations: Computations, shape: tuple[int, ...], count: int) -> Instruction:
    """The one loop that carries ``count`` arrays of ``shape`` or more."""
    found = [
        instruction
        for lines in computations.values()
        for instruction in lines
        if instruction.opcode == "while" and instruction.shapes.count(shape) >= count
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} loops carry {count} arrays of shape {shape}; wanted one")
    return found[0]


def collectives(computations: Computations, loop: Instruction) -> list[Instruction]:
    """All collectives in a loop's body and condition, asynchronous ones by their start."""
    return [
        instruction
        for computation in reachable(computations, loop.called)
        for instruction in computations[computation]
        if instruction.opcode.removesuffix("-start") in COLLECTIVES
    ]


def groups_of(instruction: Instruction, devices: int) -> list[list[int]]:
    """Which devices a collective joins: lists of places in the mesh."""
    line = instruction.line
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)
    if pairs:
        return [[int(a), int(b)] for a, b in re.findall(r"(\d+),(\d+)", pairs.group(1))]
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", line
    )
    if mesh:
        return _mesh_groups(*mesh.groups())
    listed = re.search(r"replica_groups=\{(\{.*?\})?\}", line)
    if listed:
        groups = re.findall(r"\{([\d,]*)\}", listed.group(1) or "")
        return [[int(i) for i in group.split(",")] for group in groups] or [list(range(devices))]
    iota = re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if iota is None:
        raise ValueError(f"no replica groups in {line[:200]!r}")
    return _iota(iota.group(2)).reshape(_sizes(iota.group(1))).tolist()


def _sizes(text: str) -> list[int]:
    return [int(size) for size in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """[8,2]T(1,0): the numbers from 0 on in that shape, transposed."""
    shape, _, order = text.partition("T")
    places = np.arange(math.prod(_sizes(shape))).reshape(_sizes(shape))
    return places.transpose(_sizes(order)) if order else places


def _mesh_groups(axes: str, order: str | None, along: str) -> list[list[int]]:
    """Groups along the named axes of a mesh such as ``'a'=8,'b'=2``."""
    names = re.findall(r"'(\w+)'=", axes)
    sizes = [int(size) for size in re.findall(r"=(\d+)", axes)]
    places = np.arange(math.prod(sizes)) if order is None else _iota(order)
    chosen = [names.index(name) for name in re.findall(r"'(\w+)'", along)]
    if ":" in along:
        raise ValueError(f"parts of axes are not understood: {along!r}")
    others = [axis for axis in range(len(names)) if axis not in chosen]
    joined = math.prod(sizes[axis] for axis in chosen)
    return places.reshape(sizes).transpose(others + chosen).reshape(-1, joined).tolist()


def new_arrays(computations: Computations, loop: Instruction, elements: int) -> list[Instruction]:
    """What a loop materialises with at least so many elements, in-place updates aside.

    Fusions count by their result: what is inside them is never in memory.
    """
    return [
        instruction
        for computation in reachable(computations, loop.called, into_fusions=False)
        for instruction in computations[computation]
        if instruction.elements >= elements
        and instruction.opcode not in _NAMES
        and not _updates_in_place(computations, instruction)
    ]


def _updates_in_place(computations: Computations, instruction: Instruction) -> bool:
    if instruction.opcode == "dynamic-update-slice":
        return True
    if instruction.opcode != "fusion":
        return False
    # The last instruction of a computation is its root.
    roots = [computations[callee][-1] for callee in instruction.called]
    return all(root.opcode == "dynamic-update-slice" for root in roots)
