"""On CPUs, memory that a step gives back stays with the process: the next step has it at once.

A compiled step asks for all its temporary memory in one piece and gives it back. The C library
returns pieces of that size to the system, which hands them out again page by page and filled with
zeros: up to an eighth of a PPO step of 27 million parameters (docs/results/workloads.md). Programs
call `one_heap` before jax starts, and take the steps of their loops from `loop`.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

_Item = TypeVar("_Item")
# Options of mallopt (malloc.h of the GNU C library):
# https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html
_ARENA_MAX, _MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -4, -3, -1
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # nothing goes to the system by itself
# Both thresholds move by themselves until one is set; these are where they end in a large process.
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}
# A piece is found again a little too short for what it was cut for (alignment), so the second step
# cuts another, and from the third on they lie side by side. Until then all goes back to the
# system, and so a run holds about what it would without all this.
_SETTLING = 2

_allocator: ctypes.CDLL | None = None  # of this process, once its threads share one heap


def one_heap() -> None:
    """Threads that start from now on share the heap of the first one, which alone can grow as large
    as a step's memory; to be called before jax starts its own.

    Nothing is changed, here and in `loop`, where jax may have accelerators, whose machines gain
    nothing by it; where the environment has options for the allocator (MALLOC_..., GLIBC_TUNABLES);
    and with another allocator.
    """
    global _allocator
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    tuned |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    library = _library()
    if library is not None and not tuned and _cpus_only():
        taken = library.mallopt(_ARENA_MAX, 1) == 1  # others that have a mallopt refuse
        _allocator = library if taken else None


def _cpus_only() -> bool:
    """Whether jax will run on CPUs, told without starting it."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def loop(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yields ``items``, the steps of a loop; meanwhile freed memory stays with the process.

    It goes back to the system after the first two steps and at the end. Without `one_heap` this is
    ``items``. Not for a loop within a loop: the inner one's end ends the outer one's too.

    Example:
        >>> for step in loop(range(10)):
        ...     pass
    """
    if _allocator is None:
        yield from items
        return
    try:
        _set(_KEPT)
        for done, item in enumerate(items):
            yield item
            if done < _SETTLING:
                _allocator.malloc_trim(0)
    finally:
        _set(_USUAL)
        _allocator.malloc_trim(0)


def _library() -> ctypes.CDLL | None:
    """The C library of this process if its allocator has these options; else None."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def _set(options: dict[int, int]) -> None:
    for option, value in options.items():
        _allocator.mallopt(option, value)
