"""Weights between two policies against a loop over tokens in numpy's float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.importance import BOUNDS, check_bounds, held_weights, log_weights

LENGTHS = (5, 1, 0, 3, 2)  # a row of length 1 and one that is all padding
WIDTH = 5


def batch(scale=1.0, seed=0):
    """(log π_old, log π_roll, mask), NaN in padding."""
    rng = np.random.default_rng(seed)
    mask = np.arange(WIDTH)[None] < np.array(LENGTHS)[:, None]
    old, rolled = (np.where(mask, scale * rng.normal(size=mask.shape), np.nan) for _ in range(2))
    return old.astype(np.float32), rolled.astype(np.float32), mask


def by_loop(old, rolled, mask, how, low, high):
    """(weight, held) by the definition, token by token."""
    weight, held = np.ones(mask.shape), np.zeros(mask.shape, bool)
    for i, t in np.argwhere(mask):
        if how in ("tis", "token_mask"):
            w = math.exp(float(old[i, t]) - float(rolled[i, t]))
        else:
            w = math.exp(
                sum(float(old[i, u]) - float(rolled[i, u]) for u in np.flatnonzero(mask[i]))
            )
        if how in ("tis", "sequence_tis"):
            weight[i, t], held[i, t] = min(w, high), w > high
        else:
            inside = low <= w <= high
            weight[i, t], held[i, t] = w if inside else 0.0, not inside
    return weight, held


@pytest.mark.parametrize("how", BOUNDS)
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_against_a_loop(how, scale):
    old, rolled, mask = batch(scale)
    low, high = check_bounds(how, None, None)
    log_weight = log_weights(old, rolled, mask)
    weight, held = held_weights(log_weight, mask, how=how, low=low, high=high)
    wanted_weight, wanted_held = by_loop(old, rolled, mask, how, low, high)
    np.testing.assert_allclose(weight, wanted_weight, rtol=2e-6)
    np.testing.assert_array_equal(held, wanted_held)
    assert held.any() or scale < 1


def test_the_bounds_that_are_usual():
    assert check_bounds("tis", None, None) == (None, 2.0)
    assert check_bounds("sequence_tis", None, 5.0) == (None, 5.0)
    assert check_bounds("token_mask", None, None) == (0.5, 2.0)
    assert check_bounds("token_mask", 0.2, 5) == (0.2, 5)
    assert check_bounds("sequence_mask", None, None) == (0.0, 3.0)


@pytest.mark.parametrize(
    ("how", "low", "high", "message"),
    [
        ("tiss", None, None, "how='tiss' is unknown; known: tis, sequence_tis, token_mask"),
        ("tis", 0.5, 2.0, "low=0.5, but tis only holds weights from above"),
        ("token_mask", -0.1, 2.0, "wanted 0 <= low <= 1 <= high"),
        ("token_mask", 3.0, 2.0, "low=3.0 and high=2.0"),
        ("token_mask", 1.1, 2.0, "wanted 0 <= low <= 1"),
        ("tis", None, 0.9, "low=None and high=0.9"),
        ("tis", None, float("inf"), "high=inf"),
        ("sequence_mask", float("nan"), 2.0, "low=nan"),
    ],
)
def test_impossible_bounds_are_refused(how, low, high, message):
    with pytest.raises(ValueError, match=message):
        check_bounds(how, low, high)


@pytest.mark.parametrize("how", BOUNDS)
def test_a_sampler_far_away_stays_finite(how):
    mask = np.ones((2, 3), bool)
    old = np.array([[0.0, 0.0, 0.0], [-1e4, -1e4, -1e4]], np.float32)
    low, high = check_bounds(how, None, None)
    log_weight = log_weights(old, -1e3 + 0 * old, mask)
    weight, _ = held_weights(log_weight, mask, how=how, low=low, high=high)
    assert np.isfinite(weight).all() and (np.asarray(weight[0]) <= high).all()
    slope = jax.grad(lambda x: held_weights(x, mask, how=how, low=low, high=high)[0].sum())
    assert np.isfinite(slope(jnp.asarray(log_weight))).all()
