"""On CPUs, memory that a step gives back stays with the process: the next step has it at once.

A compiled step asks for all its temporary memory in one piece and gives it back. The C library
returns pieces of that size to the system, which hands them out again page by page and filled with
zeros: an eighth of a PPO step of 27 million parameters (docs/results/workloads.md). Programs call
`one_heap` before jax starts, and take the steps of their loops from `loop`.
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
# Options of mallopt (malloc.h of the GNU C library) with what a loop wants and what is usual:
# https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # nothing goes to the system by itself
_USUAL = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 * 1024}
# A piece is found again a little too short for what it was cut for (alignment), so the second step
# cuts another, and from the third on they lie side by side. Until then all goes back to the
# system, and so a run holds no more than it would without all this.
_SETTLING = 2


def one_heap() -> None:
    """Threads that start from now on share the heap of the first one, which alone can grow as large
    as a step's memory; to be called before jax starts its own.

    Nothing is changed where jax may have accelerators: on their machines it gains nothing.
    """
    library = _library()
    if library is not None and _cpus_only():
        _set(library, {_ARENA_MAX: 1})


def _cpus_only() -> bool:
    """Whether jax will run on CPUs, told without starting it."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def loop(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yields ``items``, the steps of a loop; meanwhile freed memory stays with the process.

    It goes back to the system after the first two steps and at the end. Where devices have memory
    of their own, and where `one_heap` can do nothing, this is ``items``.

    Example:
        >>> for step in loop(range(10)):
        ...     pass
    """
    library = _library() if jax.default_backend() == "cpu" else None
    if library is None:
        yield from items
        return
    _set(library, _KEPT)
    try:
        for done, item in enumerate(items):
            yield item
            if done < _SETTLING:
                library.malloc_trim(0)
    finally:
        _set(library, _USUAL)
        library.malloc_trim(0)


def _library() -> ctypes.CDLL | None:
    """The C library of this process if its allocator has these options; None without it, and where
    the environment has options of its own (MALLOC_ARENA_MAX)."""
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ:
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def _set(library: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        if library.mallopt(option, value) != 1:
            raise RuntimeError(f"mallopt({option}, {value}) was refused")
