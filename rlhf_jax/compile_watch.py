"""Counts what is compiled while a loop is at work: a warm loop must compile nothing."""

import contextlib
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


def compiled() -> int:
    """Programs that XLA compiled in this process up to now, those of the persistent cache too."""
    return _compiled


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
        self._elsewhere = 0

    def loop(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yields ``items``; what is compiled between two of them belongs to the first."""
        for done, item in enumerate(items):
            before, self._elsewhere = _compiled, 0
            yield item
            if done >= _WARM_UP:
                self.after_warmup += _compiled - before - self._elsewhere

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is compiled inside is not the loop's own, such as a checkpoint's copies."""
        before = _compiled
        yield
        self._elsewhere += _compiled - before
