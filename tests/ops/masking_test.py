"""Masked reductions against loops, with NaN in every masked entry."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import masking

NAN = float("nan")
X = np.array([[1.0, 2.0, NAN], [NAN, NAN, NAN], [5.0, NAN, 4.0]], np.float32)
MASK = ~np.isnan(X)


def test_sums_and_means_take_only_the_true_entries():
    np.testing.assert_array_equal(masking.masked_sum(X, MASK, axis=1), [3, 0, 9])
    np.testing.assert_array_equal(masking.masked_mean(X, MASK, axis=1), [1.5, 0, 4.5])
    np.testing.assert_array_equal(masking.masked_var(X, MASK, axis=1), [0.25, 0, 0.25])
    assert float(masking.masked_mean(X, MASK)) == 3.0
    assert float(masking.masked_var(X, MASK)) == np.var([1, 2, 5, 4])


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
def test_moments_equal_numpy_where_nothing_is_masked(axis):
    x = np.random.default_rng(0).normal(3.0, 2.0, (4, 5)).astype(np.float32)
    mask = np.ones_like(x, bool)
    np.testing.assert_allclose(masking.masked_sum(x, mask, axis), x.sum(axis), rtol=1e-6)
    np.testing.assert_allclose(masking.masked_mean(x, mask, axis), x.mean(axis), rtol=1e-6)
    np.testing.assert_allclose(masking.masked_var(x, mask, axis), x.var(axis), rtol=1e-5)


def test_variance_survives_a_large_mean():
    x = np.array([10000.0, 10001.0, 10002.0], np.float32)
    assert float(masking.masked_var(x, np.ones(3, bool))) == pytest.approx(2 / 3, rel=1e-6)


def test_sums_are_float32_for_every_input_type():
    mask = np.ones(1000, bool)
    assert masking.masked_sum(jnp.ones(1000, jnp.bfloat16), mask) == 1000  # bf16 stops at 256
    assert masking.masked_sum(np.arange(4), np.ones(4, bool)).dtype == jnp.float32
    assert masking.masked_mean(np.array([True, False]), np.ones(2, bool)) == 0.5


def test_whiten_by_hand_and_by_loop():
    np.testing.assert_allclose(
        masking.whiten(np.array([1.0, 3.0, NAN], np.float32), np.array([True, True, False])),
        [-1.0, 1.0, 0.0],
    )
    valid = [float(v) for v in X[MASK]]
    mean = sum(valid) / len(valid)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in valid) / len(valid))
    whitened = np.asarray(masking.whiten(X, MASK))
    np.testing.assert_allclose(whitened[MASK], [(v - mean) / deviation for v in valid], rtol=1e-6)
    np.testing.assert_array_equal(whitened[~MASK], 0)
    kept = np.asarray(masking.whiten(X, MASK, shift_mean=False))
    np.testing.assert_allclose(kept[MASK], whitened[MASK] + mean, rtol=1e-6)
    np.testing.assert_array_equal(kept[~MASK], 0)


@pytest.mark.parametrize(
    "x", [[0.1, 0.1, 0.1], [-7.3] * 7, [1234.567] * 30, [7.0, NAN, NAN], [NAN, NAN, NAN]]
)
def test_whitened_equal_numbers_are_exactly_zero(x):
    x = np.array(x, np.float32)
    np.testing.assert_array_equal(masking.whiten(x, ~np.isnan(x)), 0)
    kept = np.asarray(masking.whiten(x, ~np.isnan(x), shift_mean=False))
    np.testing.assert_array_equal(kept, np.where(np.isnan(x), 0, x))


def test_gradients_ignore_padding():
    def total(x):
        mean, var = masking.masked_mean(x, MASK), masking.masked_var(x, MASK)
        return mean + var + jnp.sum(jnp.square(masking.whiten(x, MASK)) ** 2)

    gradient = np.asarray(jax.grad(total)(jnp.asarray(X)))
    np.testing.assert_array_equal(gradient[~MASK], 0)
    assert np.all(np.isfinite(gradient[MASK])) and np.any(gradient[MASK] != 0)


def test_last_true_handles_gaps_and_empty_rows():
    mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
    wanted = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(masking.last_true(mask), wanted)
    np.testing.assert_array_equal(masking.last_true(mask[0]), wanted[0])
    np.testing.assert_array_equal(masking.last_true(mask[:, None]), wanted[:, None])


def test_place_at_last_keeps_fractions_and_skips_empty_rows():
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    placed = masking.place_at_last(np.array([0.7, NAN, -2.5], np.float32), mask)
    assert placed.dtype == jnp.float32  # a peer wrote scores into a buffer of token ids
    np.testing.assert_array_equal(
        placed, np.array([[0, 0.7, 0], [0, 0, 0], [0, 0, -2.5]], np.float32)
    )


def test_mean_of_adds_up_over_parts():
    whole = masking.mean_of(X, MASK)
    parts = [masking.mean_of(X[i], MASK[i]) for i in range(3)]
    assert float(whole.total) == sum(float(p.total) for p in parts) == 12
    assert float(whole.count) == sum(float(p.count) for p in parts) == 4


def test_fill_padding_keeps_the_type():
    filled = masking.fill_padding(np.array([3, 4], np.int32), np.array([True, False]), value=9)
    assert filled.dtype == jnp.int32
    np.testing.assert_array_equal(filled, [3, 9])
