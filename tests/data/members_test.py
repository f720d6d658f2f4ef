"""Orders of an ensemble's members over one source."""

import jax
import numpy as np
import pytest

from rlhf_jax.data.members import MemberSource
from rlhf_jax.data.preferences import pairs
from rlhf_jax.text.tokenizer import CharTokenizer

RECORDS = [{"prompt": "a", "chosen": c, "rejected": "da"} for c in "abcd" * 3]


def source(seed=3):
    return pairs([RECORDS], CharTokenizer("abcd"), template="{prompt}", max_length=4, seed=seed)


def orders(of, members):
    """Records that each member draws in one epoch, two rows at a time."""
    n = 2 * members
    drawn = [of.batch(p, slice(0, n), n).record for p in range(0, len(RECORDS), 2)]
    return np.concatenate([batch.reshape(2, members) for batch in drawn]).T


def test_every_member_draws_every_record_in_an_order_of_its_own():
    found = orders(MemberSource(source(), members=3, seed=3), 3)
    for order in found:
        assert sorted(order) == list(range(len(RECORDS)))
    assert len({tuple(order) for order in found}) == 3
    assert tuple(found[0]) == tuple(orders(MemberSource(source(), members=1, seed=3), 1)[0])
    again = orders(MemberSource(source(), members=3, seed=3), 3)
    np.testing.assert_array_equal(found, again)
    assert MemberSource(source(), members=3, seed=3).total == len(RECORDS)


def test_processes_read_their_own_rows_of_one_batch():
    of = MemberSource(source(), members=2, seed=0)
    whole = of.batch(4, slice(0, 8), 8)
    parts = [of.batch(4, slice(first, first + 4), 8) for first in (0, 4)]
    jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, np.concatenate(b)), whole, *parts)
    with pytest.raises(ValueError, match="cut through groups of 2 members"):
        of.batch(0, slice(1, 3), 8)
