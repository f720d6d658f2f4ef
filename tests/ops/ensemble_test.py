"""Combining members by hand: three members, four completions."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.ensemble import (
    HOWS,
    combine_members,
    disagreement,
    member_statistics,
    standardise_members,
)

SCORES = np.float32([[0, 1, 2, 5], [3, 1, 0, 5], [6, 1, 4, 5]])


def test_each_way_by_hand():
    # Over members: means 3, 1, 2, 5; variances 6, 0, 8/3, 0.
    np.testing.assert_allclose(combine_members(SCORES, "mean"), [3, 1, 2, 5])
    np.testing.assert_allclose(combine_members(SCORES, "worst"), [0, 1, 0, 5])
    np.testing.assert_allclose(
        combine_members(SCORES, "uwo", coef=0.5), [0, 1, 2 / 3, 5], rtol=1e-6
    )
    lcb = [3 - 6**0.5, 1, 2 - (8 / 3) ** 0.5, 5]
    np.testing.assert_allclose(combine_members(SCORES, "lcb", coef=1.0), lcb, rtol=1e-5)
    np.testing.assert_allclose(disagreement(SCORES), [6**0.5, 0, (8 / 3) ** 0.5, 0], rtol=1e-6)


def test_axes_behind_the_members_are_kept():
    by_token = np.stack([SCORES, 2 * SCORES, -SCORES], axis=2)  # [E B T]
    for how in HOWS:
        whole = combine_members(by_token, how)
        assert whole.shape == (4, 3)
        for t in range(3):
            np.testing.assert_allclose(whole[:, t], combine_members(by_token[..., t], how))


@pytest.mark.parametrize("how", HOWS)
def test_one_member_is_itself_and_more_doubt_never_pays(how):
    np.testing.assert_array_equal(combine_members(SCORES[:1], how), SCORES[0])
    low, high = (combine_members(SCORES, how, coef=c) for c in (0.1, 2.0))
    assert np.all(high <= low) and np.all(low <= SCORES.max(axis=0))
    moved = SCORES[[2, 0, 1]]
    np.testing.assert_allclose(combine_members(moved, how), combine_members(SCORES, how), rtol=1e-6)


def test_standardised_members_are_on_one_scale():
    """A member's offset and scale, which preferences leave free, change nothing any more."""
    mean, std = member_statistics(SCORES)
    np.testing.assert_allclose(mean, [2, 2.25, 4], rtol=1e-6)
    np.testing.assert_allclose(std, SCORES.std(axis=1), rtol=1e-6)
    want = standardise_members(SCORES, mean, std)
    changed = SCORES * np.float32([[1], [10], [0.1]]) + np.float32([[0], [-50], [7]])
    np.testing.assert_allclose(
        standardise_members(changed, *member_statistics(changed)), want, atol=1e-5
    )
    assert not np.allclose(combine_members(SCORES, "worst"), combine_members(changed, "worst"))


def test_a_constant_member_is_centred_and_not_scaled():
    flat = jnp.stack([jnp.full(4, 9.0), jnp.arange(4.0)])
    mean, std = member_statistics(flat)
    assert float(std[0]) == 1.0
    np.testing.assert_array_equal(standardise_members(flat, mean, std)[0], np.zeros(4))


def test_bad_ways_are_named():
    with pytest.raises(ValueError, match="how='median'; known: mean, lcb, worst, uwo"):
        combine_members(SCORES, "median")
    with pytest.raises(ValueError, match="coef=-1; wanted 0 or more"):
        combine_members(SCORES, "lcb", coef=-1)
