"""Which record is drawn when: a pure function of a seed and one integer, the position.

Position p counts the records drawn so far, so it is all that a checkpoint needs to go on. Each
epoch draws every record once, in an order of its own (grain's index shuffle, which holds no list
of the order). A batch may span two epochs.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from rlhf_jax.data.sources import Record, RecordSource, place

OVERLONG = ("error", "skip", "truncate")
# Encoded records kept in memory. Reading and encoding one again costs about 0.1 ms.
_KEPT = 2**16

# Which of the encoded records that fit are kept, by their places.
Select = Callable[[Iterator[Any]], Sequence[int]]

_log = logging.getLogger(__name__)


class Flaw(NamedTuple):
    """What is wrong with an encoded record. `useless`: nothing can be learnt from it."""

    what: str  # as a message says it, of several records
    useless: bool


class Drawn(NamedTuple):
    """One drawn record."""

    source: int
    record: int  # index within the source
    index: int  # index over all sources, in the order they were given
    draw: int  # how often it was drawn before
    encoded: Any


class Draws:
    """The records of some sources that fit, in the order in which they are drawn.

    Every record is encoded once at the start, so that bad and overlong ones are known before
    anything runs.

    Args:
        sources: where records come from; together they are one set.
        encode: record -> what batches are made of.
        length: encoded -> tokens.
        limit: the largest length; longer records are overlong.
        limit_name: what to call the limit in messages.
        overlong: "error" refuses them, "skip" leaves them out, "truncate" keeps them for the
            caller to cut. Either way `num_overlong` counts them.
        seed: decides the order; 0 or more.
        shuffle: False draws in the order of the sources.
        select: which of the records that fit are drawn; None draws all.
        flaw: encoded -> what is wrong with it, or None. Flaws are counted in `num_flaws` and
            reported once per kind; useless records are left out.

    Raises:
        ValueError: a record cannot be encoded (names source and record), is overlong under
            "error", or none is left.
    """

    def __init__(
        self,
        sources: Sequence[RecordSource],
        encode: Callable[[Record], Any],
        length: Callable[[Any], int],
        *,
        limit: int,
        limit_name: str,
        overlong: str,
        seed: int,
        shuffle: bool,
        select: Select | None = None,
        flaw: Callable[[Any], Flaw | None] | None = None,
    ):
        if overlong not in OVERLONG:
            raise ValueError(f"overlong={overlong!r} is not one of {', '.join(OVERLONG)}")
        self.sources = tuple(sources)
        self._encode = encode
        self._encoded = functools.lru_cache(maxsize=_KEPT)(self._read)
        self._offsets = np.cumsum([0, *(len(source) for source in self.sources)]).tolist()
        flaws = _Flaws(flaw)
        self._kept, self.num_overlong = self._scan(length, limit, limit_name, overlong, flaws)
        self.num_flaws = flaws.counts
        if select is not None:
            self._kept = self._selected(select)
        self._shuffle, self._order = shuffle, self._drawn_by(seed, shuffle)

    def __len__(self) -> int:
        """Records per epoch."""
        return len(self._kept)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(source, record) of all that are drawn in an epoch, in the order of the sources."""
        return tuple(self._kept)

    @property
    def total(self) -> int:
        """Records of all sources, drawn or not: `Drawn.index` is below."""
        return self._offsets[-1]

    def reordered(self, seed: int) -> "Draws":
        """The same records in the order of another seed; encoded ones are shared."""
        other = copy.copy(self)
        other._order = self._drawn_by(seed, self._shuffle)
        return other

    def _drawn_by(self, seed: int, shuffle: bool) -> grain.MapDataset:
        order = grain.MapDataset.range(len(self._kept))
        return (order.seed(seed).shuffle() if shuffle else order).repeat()

    def _selected(self, select: Select) -> list[tuple[int, int]]:
        chosen = select(self._encoded(*place) for place in self._kept)
        if not len(chosen):
            raise ValueError(
                f"no records are left of {len(self._kept)} that fit: none was selected"
            )
        if len(chosen) < len(self._kept):
            _log.info("kept %d of %d records that fit", len(chosen), len(self._kept))
        return [self._kept[place] for place in chosen]

    def check(self, test: Callable[[Any], None]) -> None:
        """Gives every encoded record that is drawn to `test`; its ValueError names the record."""
        for at in self._kept:
            try:
                test(self._encoded(*at))
            except ValueError as error:
                raise ValueError(f"{self.place(*at)}: {error}") from error

    def get(self, position: int, rows: slice, n: int) -> list[Drawn]:
        """The rows `rows` of the batch of `n` records at `position`."""
        return [self._at(position + row) for row in range(*rows.indices(n))]

    def _at(self, position: int) -> Drawn:
        source, record = self._kept[self._order[position]]
        return Drawn(
            source=source,
            record=record,
            index=self._offsets[source] + record,
            draw=position // len(self._kept),
            encoded=self._encoded(source, record),
        )

    def _read(self, source: int, record: int) -> Any:
        try:
            return self._encode(self.sources[source][record])
        except ValueError as error:
            raise ValueError(f"{self.place(source, record)}: {error}") from error

    def place(self, source: int, record: int) -> str:
        """Where a record stands, for messages: file and line where the source is a file."""
        found = place(self.sources[source], record)
        return f"source {source}, {found}" if found == f"record {record}" else found

    def _scan(
        self, length, limit, limit_name, overlong, flaws: "_Flaws"
    ) -> tuple[list[tuple[int, int]], int]:
        kept, count, first = [], 0, ""
        for source, records in enumerate(self.sources):
            for record in range(len(records)):
                tokens = length(self._encoded(source, record))
                if tokens > limit:
                    count += 1
                    first = first or f"{self.place(source, record)} has {tokens} tokens"
                    if overlong != "truncate":
                        continue
                if flaws.passes(self._encoded(source, record), (source, record)):
                    kept.append((source, record))
        total = self._offsets[-1]
        if count and overlong == "error":
            raise ValueError(
                f"{first} but {limit_name}={limit}; {count} of {total} records are longer; raise "
                f'{limit_name}, or set overlong to "skip" or "truncate"'
            )
        if count:
            done = "skipped" if overlong == "skip" else "truncated"
            message = "%s %d of %d records over %s=%d: %s"
            _log.warning(message, done, count, total, limit_name, limit, f"{first}, the first")
        flaws.report(total, self.place)
        if not kept:
            found = "".join(f"; {what}: {number}" for what, number in flaws.counts.items())
            raise ValueError(
                f"no records are left: {total} in {len(self.sources)} sources, {count} of them "
                f"over {limit_name}={limit}{found}"
            )
        return kept, count


class _Flaws:
    """Counts what is wrong with records, and knows the first of each kind."""

    def __init__(self, flaw: Callable[[Any], Flaw | None] | None):
        self._flaw = flaw
        self._first: dict[Flaw, tuple[int, int]] = {}
        self.counts: dict[str, int] = {}

    def passes(self, encoded: Any, at: tuple[int, int]) -> bool:
        """Whether a record is kept."""
        found = None if self._flaw is None else self._flaw(encoded)
        if found is None:
            return True
        self._first.setdefault(found, at)
        self.counts[found.what] = self.counts.get(found.what, 0) + 1
        return not found.useless

    def report(self, total: int, place: Callable[[int, int], str]) -> None:
        """One warning for each kind."""
        for found, at in self._first.items():
            done = "left out" if found.useless else "kept"
            message = "%s: %d of %d records (%s): %s, the first"
            _log.warning(message, found.what, self.counts[found.what], total, done, place(*at))
