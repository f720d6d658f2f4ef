"""One source in several orders at once: every member of an ensemble draws for itself."""

from collections.abc import Sequence

import jax
import numpy as np

from rlhf_jax.data.examples import ExampleSource
from rlhf_jax.types import Labelled, Pairs, Steps, Texts


class MemberSource:
    """Batches in which row i·E + e is row i of what member e draws, an order of its own.

    Member 0 draws in the order of the source itself, so it sees what one model would.

    Args:
        source: what all draw from; records are encoded once.
        members: E.
        seed: with the member's number it decides the other orders.
    """

    def __init__(self, source: ExampleSource, *, members: int, seed: int):
        own = [np.random.SeedSequence([seed, number]) for number in range(1, members)]
        # 31 bits: what the shuffle takes as a seed.
        seeds = [int(sequence.generate_state(1)[0] >> 1) for sequence in own]
        self._orders: Sequence[ExampleSource] = (source, *map(source.reordered, seeds))

    def __len__(self) -> int:
        """Records per epoch of one member."""
        return len(self._orders[0])

    @property
    def source(self) -> ExampleSource:
        """What all draw from."""
        return self._orders[0]

    @property
    def total(self) -> int:
        """Records of all sources, drawn or not."""
        return self._orders[0].total

    def batch(self, position: int, rows: slice, n: int) -> Texts | Pairs | Labelled | Steps:
        """The rows `rows` of the batch of `n` = E · (rows of a member) after `position` draws of
        each member. `rows` begins and ends between members' groups."""
        members = len(self._orders)
        start, stop, _ = rows.indices(n)
        if n % members or start % members or stop % members:
            raise ValueError(
                f"rows {start} to {stop} of {n} cut through groups of {members} members"
            )
        own = slice(start // members, stop // members)
        drawn = [order.batch(position, own, n // members) for order in self._orders]
        return jax.tree.map(_interleave, *drawn)


def _interleave(*leaves: np.ndarray) -> np.ndarray:
    """E arrays [M ...] -> [M·E ...], row i of each beside row i of the others."""
    together = np.stack(leaves, axis=1)
    return together.reshape(len(leaves) * len(leaves[0]), *leaves[0].shape[1:])
