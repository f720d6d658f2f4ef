"""Labels that follow the model, and scores that know how often they were tested.

Where some answers are compared often and others once, maximum likelihood sends the reward of an
answer that was compared once towards plus or minus infinity, and the best of all is a fluke. Two
remedies of Zhu, Jordan and Jiao 2024, https://arxiv.org/abs/2401.16335: iterative data smoothing,
and pessimism (Zhu et al. 2023, https://arxiv.org/abs/2301.11270, section 3.2).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from rlhf_jax.types import Array


def smooth_label(
    label: Float[Array, "*M"], difference: Float[Array, "*M"], beta: Float[Array, ""] | float
) -> Float[Array, "*M"]:
    """y ← (1 − β) y + β σ(d),  d = r_a − r_b  (iterative data smoothing, algorithm 1).

    β = 0 leaves the labels alone. Once per epoch for every pair, beside an ascent on the
    cross-entropy to y with rate α, the two settle where

        β d + 2 α n σ(d) = 2 α n μ

    for a pair of free scores compared n times with the share μ of wins: large n gives the log-odds
    of μ, small n stays near 0. The cause: each epoch moves d by 2 α n (y − σ(d)) and y by
    β (σ(d) − y), so β d + 2 α n y is kept, and y ends at σ(d).
    """
    return (1 - beta) * label + beta * jax.nn.sigmoid(difference.astype(jnp.float32))


def pessimistic(
    scores: Float[Array, "*M"],
    count: Float[Array, "*M"] | Int[Array, "*M"],
    *,
    coef: float | int,
) -> Float[Array, "*M"]:
    """r − coef / √n: what a score is worth at least, if n comparisons stand behind it.

    A score that was never compared (n = 0) is −∞: nothing is known in its favour. coef = 0 changes
    the others not at all.
    """
    count = count.astype(jnp.float32)
    allowance = coef * jax.lax.rsqrt(jnp.maximum(count, 1.0))
    return jnp.where(count > 0, scores.astype(jnp.float32) - allowance, -jnp.inf)
