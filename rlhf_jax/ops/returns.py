"""Returns and advantages along the last axis.

Entries outside the mask are stepped over, not treated as zeros: the token after a masked gap is
the successor of the token before it. So padding on either side and gaps in between (text that
the policy did not write) are all handled by the mask, and may hold NaN.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.masking import fill_padding
from rlhf_jax.types import Array


def gae(
    rewards: Float[Array, "*B T"],
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    gamma: Float[Array, ""] | float,
    lam: Float[Array, "*B"] | float,
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
    """Generalised advantage estimation; returns (advantages, returns), 0 outside the mask.

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γ λ A_{t+1};  R_t = A_t + V_t

    with V = A = 0 after the last valid token (a completion is an episode that ends).
    λ = 1 is Monte Carlo, A_t = Σ_u γ^(u−t) r_u − V_t; λ = 0 is the one-step error δ_t.

    Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equation 16.

    Args:
        rewards: per token.
        values: the critic's prediction *before* token t is known.
        mask: which tokens count.
        gamma: discount per token.
        lam: one number, or one per row.
    """
    rewards = fill_padding(rewards, mask).astype(jnp.float32)
    values = fill_padding(values, mask).astype(jnp.float32)

    def step(carry, inputs):
        next_value, next_advantage = carry
        reward, value, valid = inputs
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (
            jnp.where(valid, value, next_value),
            jnp.where(valid, advantage, next_advantage),
        )
        return carry, jnp.where(valid, advantage, 0.0)

    advantages = _backwards(step, (rewards, values, mask), carries=2)
    return advantages, advantages + values


def length_adaptive_lambda(
    mask: Bool[Array, "*B T"], alpha: Float[Array, ""] | float | int
) -> Float[Array, "*B"]:
    """λ_i = max(0, 1 − 1 / (α |y_i|)) of each row, |y_i| being its valid tokens; 0 for none.

    Σ_u λ^u = 1 / (1 − λ) = α |y|: an advantage reaches a fixed share of the completion ahead,
    however long it is. α = 0.05 gives 0.8 at 100 tokens and 0.98 at 1000; rows of 1/α tokens or
    fewer have λ = 0 (the formula would be negative).

    Yue et al. 2025 (VAPO), https://arxiv.org/abs/2504.05118, section on length-adaptive GAE; the
    bound at 0 is ours.
    """
    tokens = jnp.sum(mask, axis=-1, dtype=jnp.float32)
    return jnp.maximum(0.0, 1.0 - 1.0 / (alpha * jnp.maximum(tokens, 1.0)))


def discounted_returns(
    rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, gamma: Float[Array, ""] | float
) -> Float[Array, "*B T"]:
    """R_t = r_t + γ R_{t+1} over the valid tokens, 0 outside the mask."""
    rewards = fill_padding(rewards, mask).astype(jnp.float32)

    def step(carry, inputs):
        (following,) = carry
        reward, valid = inputs
        total = reward + gamma * following
        return (jnp.where(valid, total, following),), jnp.where(valid, total, 0.0)

    return _backwards(step, (rewards, mask), carries=1)


def reward_to_go(rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    """R_t = Σ_{u≥t} r_u over the valid tokens: discounted returns with γ = 1."""
    return discounted_returns(rewards, mask, gamma=1.0)


def _backwards(step, inputs, carries):
    """Scans from the last position to the first; carries begin at 0 and are [*B]."""
    inputs = tuple(jnp.moveaxis(jnp.asarray(x), -1, 0) for x in inputs)  # [T *B]
    start = (jnp.zeros(inputs[0].shape[1:], jnp.float32),) * carries
    _, outputs = jax.lax.scan(step, start, inputs, reverse=True)
    return jnp.moveaxis(outputs, 0, -1)
