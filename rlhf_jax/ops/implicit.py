"""Rewards that a model gives by how far it moved from its reference. In nats times β.

An outcome model whose score is r(y) = β log π(y) / π_ref(y) scores every prefix as well, and so
says what each token adds (Yuan et al. 2024, https://arxiv.org/abs/2412.01981; Cui et al. 2025,
https://arxiv.org/abs/2502.01456):

    token       r_t = β (log π(y_t) − log π_ref(y_t))
    step        r_s = Σ of r_t over the tokens of step s
    prefix      q_s = Σ of r_t up to the end of step s; σ(q_s) is the model's P(right) by then
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.masking import fill_padding
from rlhf_jax.types import Array


def token_rewards(
    logprobs: Float[Array, "*B T"],
    reference: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    beta: float | int,
) -> Float[Array, "*B T"]:
    """r_t at every token of the mask, 0 elsewhere. Σ_t r_t = β (log π(y) − log π_ref(y))."""
    logprobs, reference = fill_padding(logprobs, mask), fill_padding(reference, mask)
    return beta * (logprobs.astype(jnp.float32) - reference.astype(jnp.float32))


def step_rewards(
    rewards: Float[Array, "B T"], step_ends: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """r_s = q_s − q_{s−1} at the last token of step s, 0 elsewhere.

    Tokens behind the last step's end belong to no step.
    """
    prefix = jnp.cumsum(rewards, axis=-1)
    column = jax.lax.broadcasted_iota(jnp.int32, rewards.shape, 1)
    upto = jax.lax.cummax(jnp.where(step_ends, column, -1), axis=1)
    before = jnp.concatenate([jnp.full_like(upto[:, :1], -1), upto[:, :-1]], axis=1)  # [B T]
    previous = jnp.take_along_axis(prefix, jnp.maximum(before, 0), axis=1)
    return fill_padding(prefix - jnp.where(before < 0, 0.0, previous), step_ends)
