"""Counts what is compiled while a loop is at work: a warm loop must compile nothing."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

_Item = TypeVar("_Item")
_EVENT = "/jax/core/compile/backend_compile_duration"
_WARM_UP = 2  # the first iteration compiles; the second meets what the first one made

_compiled = 0


def _count(event: str, duration: float, **_) -> None:
    global _compiled  # jax calls the listener of the process, there is no other way to it
    _compiled += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_count)


class CompileWatch:
    """Counts the programs that XLA compiled from the third iteration of its loops on.

    A program that comes from the persistent cache counts too: it was met for the first time.

    Example:
        >>> watch = CompileWatch()
        >>> for step in watch.loop(range(10)):
        ...     pass
        >>> watch.after_warmup
        0
    """

    def __init__(self):
        self.after_warmup = 0

    def loop(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yields ``items``; what is compiled between two of them belongs to the first."""
        for done, item in enumerate(items):
            before = _compiled
            yield item
            if done >= _WARM_UP:
                self.after_warmup += _compiled - before
