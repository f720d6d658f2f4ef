"""KL estimators: literal values, expectation, limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.divergence import ESTIMATORS, kl_estimate


def test_by_loop():
    logprobs = np.array([-1.0, -2.0, -0.3, -5.0], np.float32)
    ref = np.array([-1.0, -0.5, -4.0, -5.001], np.float32)
    delta = [float(d) for d in logprobs - ref]
    wanted = {
        "k1": delta,
        "k2": [d * d / 2 for d in delta],
        "k3": [math.exp(-d) - 1 + d for d in delta],
    }
    wanted["k3+"] = wanted["k3"]
    for name in ESTIMATORS:
        np.testing.assert_allclose(
            kl_estimate(logprobs, ref, name), wanted[name], rtol=1e-5, atol=2e-10
        )


def test_expectation_under_the_policy():
    policy, ref = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.5, 0.3])
    kl = float((policy * np.log(policy / ref)).sum())
    logs = [np.log(p).astype(np.float32) for p in (policy, ref)]
    for name in ("k1", "k3"):  # both are unbiased
        assert float((policy * kl_estimate(*logs, name)).sum()) == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_policies_have_none_and_extremes_are_finite(name):
    x = jnp.array([-3.0, -0.1])
    np.testing.assert_array_equal(kl_estimate(x, x, name), 0)
    far = jnp.array([-1000.0, 0.0]), jnp.array([0.0, -1000.0])
    value, gradient = jax.value_and_grad(lambda a: kl_estimate(a, far[1], name).sum())(far[0])
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_the_straight_through_estimator_has_the_gradient_of_k2():
    """Δ ∇log π, where that of k3 is (1 − exp(−Δ)) ∇log π."""
    logprobs, ref = jnp.array([-1.0, -2.0]), jnp.array([-1.5, -0.5])
    gradient = jax.grad(lambda x: kl_estimate(x, ref, "k3+").sum())(logprobs)
    np.testing.assert_allclose(gradient, [0.5, -1.5], rtol=1e-6)
    plain = jax.grad(lambda x: kl_estimate(x, ref, "k3").sum())(logprobs)
    np.testing.assert_allclose(plain, [1 - math.exp(-0.5), 1 - math.exp(1.5)], rtol=1e-5)


def test_k3_keeps_small_differences():
    small = jnp.array([1e-3])
    assert float(kl_estimate(small, jnp.zeros(1), "k3")[0]) == pytest.approx(5e-7, rel=1e-2)


def test_unknown_estimator_lists_the_known():
    with pytest.raises(ValueError, match="'k4'; known: k1, k2, k3"):
        kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")
