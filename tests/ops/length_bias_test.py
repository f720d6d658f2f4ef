"""Length statistics by hand, against loops, and the identities of NRG (methods of 2310.03716)."""

import math

import numpy as np
import pytest

from rlhf_jax.ops import length_bias as lb

RNG = np.random.default_rng(0)


def test_pair_lengths_by_hand():
    found = lb.pair_lengths(
        np.array([3.0, 1.0, 2.0, 5.0]),
        np.array([1.0, 2.0, 2.0, 0.0]),
        np.array([10, 10, 4, 7]),
        np.array([5, 12, 4, 3]),
    )
    assert (found.mean_chosen, found.mean_rejected, found.equal) == (7.75, 6.0, 0.25)
    assert found.longer_wins == (1 + 0 + 0.5 + 1) / 4
    assert found.accuracy_longer == 1.0 and found.accuracy_shorter == 0.0
    wanted = np.corrcoef([2, -1, 0, 5], [5, -2, 0, 4])[0, 1]
    assert found.correlation == pytest.approx(wanted, abs=1e-12)


def test_a_model_that_is_length_is_right_where_the_better_one_is_longer():
    long, short = RNG.integers(1, 99, 50), RNG.integers(1, 99, 50)
    found = lb.pair_lengths(long.astype(float), short.astype(float), long, short)
    assert (found.accuracy_longer, found.accuracy_shorter) == (1.0, 0.0)
    assert found.correlation == pytest.approx(1.0)


def test_nothing_of_a_kind_is_no_number():
    found = lb.pair_lengths(np.array([1.0]), np.array([0.0]), np.array([2]), np.array([1]))
    assert math.isnan(found.accuracy_shorter) and math.isnan(found.correlation)
    assert math.isnan(lb.correlation(np.full(7, 0.1), RNG.normal(size=7)))


def test_within_prompt_correlations_against_numpy():
    lengths = [RNG.integers(1, 50, 8) for _ in range(5)] + [np.full(8, 3)]
    scores = [RNG.normal(size=8) for _ in range(6)]
    found = lb.within_prompt_correlations(lengths, scores)
    wanted = [np.corrcoef(x, y)[0, 1] for x, y in zip(lengths[:5], scores[:5], strict=True)]
    np.testing.assert_allclose(found[:5], wanted, atol=1e-12)
    assert math.isnan(found[5])


def test_length_gain_against_a_loop():
    before, after = RNG.integers(0, 120, 300), RNG.integers(30, 200, 250)
    old, new = RNG.normal(size=300), RNG.normal(size=250) + 0.01 * after
    total = weighted = 0
    for bucket in range(20):
        a = [r for n, r in zip(before, old, strict=True) if n // 20 == bucket]
        b = [r for n, r in zip(after, new, strict=True) if n // 20 == bucket]
        if a and b:
            total += len(a) + len(b)
            weighted += (len(a) + len(b)) * (sum(b) / len(b) - sum(a) / len(a))
    found = lb.length_gain(before, old, after, new)
    assert found.within == pytest.approx(weighted / total, abs=1e-12)
    assert found.gain == pytest.approx(new.mean() - old.mean(), abs=1e-12)
    assert found.ratio == pytest.approx(found.within / found.gain, abs=1e-12)
    assert found.covered == pytest.approx(total / 550, abs=1e-12)


def test_equal_lengths_leave_the_gain_and_a_reward_of_length_leaves_nothing():
    # A-LEN: NRG = Delta R when both share the histogram, 0 where the bucket decides the reward.
    lengths = RNG.integers(0, 200, 400)
    old, new = RNG.normal(size=400), RNG.normal(size=400) + 1
    shared = lb.length_gain(lengths, old, RNG.permutation(lengths), new)
    assert shared.within == pytest.approx(shared.gain, abs=0.2)
    by_bucket = lb.length_gain(lengths, old, lengths, old + 0.5)
    assert by_bucket.within == pytest.approx(0.5, abs=1e-12) and by_bucket.ratio == pytest.approx(1)
    after = RNG.integers(60, 260, 400)
    only = lb.length_gain(lengths, (lengths // 20) ** 0.5, after, (after // 20) ** 0.5)
    assert only.within == pytest.approx(0.0, abs=1e-12) and only.gain > 0.5


def test_policies_that_share_no_length_have_no_nrg():
    with pytest.raises(ValueError, match="no bucket of 20 tokens"):
        lb.length_gain(np.array([1, 2]), np.zeros(2), np.array([50, 51]), np.ones(2))
