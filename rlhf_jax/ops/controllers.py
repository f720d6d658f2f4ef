"""Numbers of a run that follow what it measures: the KL coefficient, and a reference that moves."""

import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.types import Array

MOST_ERROR = 0.2  # of the relative error that one step answers to


def adapted_kl_coef(
    kl_coef: Float[Array, ""] | float,
    kl: Float[Array, ""] | float,
    *,
    target: float | int,
    horizon: float | int,
    rollouts: int,
    most: float = float("inf"),
) -> Float[Array, ""]:
    """β after a step that measured a divergence: the larger it is, the larger β becomes.

    β ← min(most, β (1 + clip(KL / target − 1, −0.2, 0.2) · n / horizon))

    At the target β stays as it is; a KL of twice the target (or of 1.2 times) makes it grow by
    0.2 n / horizon of itself. A KL that is not a number leaves it.

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2.

    Args:
        kl: KL(policy || reference) of this step, in nats per completion.
        target: in nats per completion.
        horizon: in completions.
        rollouts: n, completions of this step.
        most: what β must not exceed.
    """
    error = jnp.clip(jnp.float32(kl) / target - 1.0, -MOST_ERROR, MOST_ERROR)
    new = jnp.minimum(most, kl_coef * (1.0 + error * (rollouts / horizon)))
    return jnp.where(jnp.isfinite(kl), new, kl_coef).astype(jnp.float32)


def moved(
    reference: Float[Array, "..."], policy: Float[Array, "..."], decay: float | int
) -> Float[Array, "..."]:
    """decay · reference + (1 − decay) · policy, in float32, and then as the reference is.

    decay = 0 is the policy itself, bit for bit, in a buffer of its own.
    """
    if not decay:
        return jnp.copy(policy).astype(reference.dtype)
    mean = decay * reference.astype(jnp.float32) + (1.0 - decay) * policy.astype(jnp.float32)
    return mean.astype(reference.dtype)
