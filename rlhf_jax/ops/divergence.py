"""Estimators of KL(π ‖ π_ref) per token, from samples of π, in nats.

Schulman 2020, http://joschu.net/blog/kl-approx.html, with Δ = log π(y) − log π_ref(y):

    k1 = Δ                   unbiased, may be negative
    k2 = Δ² / 2              biased, never negative
    k3 = exp(−Δ) − 1 + Δ     unbiased, never negative
    k3+                      the value of k3 with the gradient of k2

Where an estimate is a term of the loss its gradient matters, not its value: that of k2, Δ ∇log π,
is the KL's own gradient in expectation; that of k1 is 0 in expectation, and that of k3 is the
gradient of the reverse KL(π_ref ‖ π). Only samples of π itself give these expectations.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.types import Array

ESTIMATORS = ("k1", "k2", "k3", "k3+")
_MAX_EXPONENT = 20.0  # exp(20) = 5e8: far outside any useful policy, far inside float32


def kl_estimate(
    logprobs: Float[Array, "*B T"], ref_logprobs: Float[Array, "*B T"], estimator: str
) -> Float[Array, "*B T"]:
    """The chosen estimator at every token. The caller masks, before and after.

    In k3 the exponent −Δ is held at 20 and below; there the estimate is constant and has no
    gradient.

    Raises:
        ValueError: unknown estimator.
    """
    check_estimator(estimator)
    delta = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    if estimator == "k1":
        return delta
    k2 = 0.5 * jnp.square(delta)
    if estimator == "k2":
        return k2
    exponent = jnp.minimum(-delta, _MAX_EXPONENT)
    k3 = jnp.expm1(exponent) - exponent  # expm1 keeps the digits of small differences
    return k3 if estimator == "k3" else k2 + jax.lax.stop_gradient(k3 - k2)


def check_estimator(estimator: str) -> None:
    """Raises ValueError, naming the known estimators, unless `estimator` is one."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
