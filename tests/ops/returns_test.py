"""Advantages against a loop over plain Python floats; reductions; gaps and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.returns import (
    discounted_returns,
    gae,
    length_adaptive_lambda,
    reward_to_go,
)

NAN = float("nan")


def loop_gae(rewards, values, mask, gamma, lam):
    """The definition as a sum over all later errors, on the valid entries of one row only."""
    places = [t for t in range(len(mask)) if mask[t]]
    r, v = [float(rewards[t]) for t in places], [float(values[t]) for t in places]
    n = len(places)
    errors = [r[t] + (gamma * v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
    result = [0.0] * len(mask)
    for i, place in enumerate(places):
        result[place] = sum((gamma * lam) ** (u - i) * errors[u] for u in range(i, n))
    return result


def batch():
    """Right padding, left padding, a gap, an empty row, length 1, and a full row."""
    mask = np.array(
        [
            [1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1],
            [1, 1, 0, 0, 1],
            [0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0],
            [1, 1, 1, 1, 1],
        ],
        bool,
    )
    rng = np.random.default_rng(0)
    rewards = np.where(mask, rng.normal(size=mask.shape), NAN).astype(np.float32)
    values = np.where(mask, rng.normal(size=mask.shape), NAN).astype(np.float32)
    return rewards, values, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_against_a_loop(gamma, lam):
    rewards, values, mask = batch()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i in range(len(mask)):
        wanted = loop_gae(rewards[i], values[i], mask[i], gamma, lam)
        np.testing.assert_allclose(advantages[i], wanted, rtol=1e-5, atol=1e-6)
    filled = np.where(mask, values, 0)
    np.testing.assert_allclose(returns, np.asarray(advantages) + filled, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(returns)[~mask], 0)


def test_gae_by_hand():
    rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]])
    advantages, returns = gae(rewards, values, jnp.ones((1, 2), bool), gamma=0.5, lam=0.5)
    # δ = (0 + 0.125 − 0.5, 1 − 0.25); A = (−0.375 + 0.25 · 0.75, 0.75)
    np.testing.assert_array_equal(advantages, np.array([[-0.1875, 0.75]], np.float32))
    np.testing.assert_array_equal(returns, np.array([[0.3125, 1.0]], np.float32))


def test_lambda_one_is_monte_carlo_and_lambda_zero_one_step():
    rewards, values, mask = batch()
    filled = np.where(mask, values, 0)
    full, _ = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    monte_carlo = np.asarray(discounted_returns(rewards, mask, gamma=0.9))
    np.testing.assert_allclose(full, monte_carlo - filled, atol=1e-6)
    one_step, returns = gae(rewards, values, mask, gamma=0.0, lam=0.95)
    np.testing.assert_allclose(one_step, np.where(mask, rewards, 0) - filled, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(mask, rewards, 0), atol=1e-6)


def test_lambda_may_differ_by_row():
    rewards, values, mask = batch()
    lam = np.linspace(0, 1, len(mask)).astype(np.float32)
    together, _ = gae(rewards, values, mask, gamma=0.9, lam=lam)
    for i in range(len(mask)):
        alone, _ = gae(rewards[i], values[i], mask[i], gamma=0.9, lam=float(lam[i]))
        np.testing.assert_allclose(together[i], alone, rtol=1e-6)


def test_reward_to_go_by_hand():
    rewards = np.array([[0.5, NAN, 0.25, 1.0, NAN]], np.float32)
    mask = ~np.isnan(rewards)
    np.testing.assert_array_equal(reward_to_go(rewards, mask), [[1.75, 0, 1.25, 1.0, 0]])
    np.testing.assert_array_equal(
        discounted_returns(rewards, mask, gamma=0.5), [[0.875, 0, 0.75, 1.0, 0]]
    )


def test_any_number_of_leading_axes():
    rewards, values, mask = batch()
    whole, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    shaped = [x.reshape(2, 3, 5) for x in (rewards, values, mask)]
    np.testing.assert_array_equal(
        gae(*shaped, gamma=0.9, lam=0.8)[0], np.asarray(whole).reshape(2, 3, 5)
    )


def test_gradients_ignore_padding():
    rewards, values, mask = batch()

    def total(rewards, values):
        advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
        return jnp.sum(jnp.square(advantages)) + jnp.sum(jnp.square(returns))

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.asarray(rewards), jnp.asarray(values)):
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


def test_lambda_by_length_in_the_papers_numbers():
    """VAPO: 0.8 at 100 tokens and 0.98 at 1000, for α = 0.05; never below 0."""
    lengths = np.array([100, 1000, 20, 19, 1, 0, 40])
    # Left and right padding and gaps count alike: only valid tokens do.
    mask = np.arange(1200)[::-1] < lengths[:, None]
    found = length_adaptive_lambda(mask, 0.05)
    np.testing.assert_allclose(found, [0.8, 0.98, 0, 0, 0, 0, 0.5], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(length_adaptive_lambda(mask[:2], 0.1), [0.9, 0.99], rtol=1e-6)
