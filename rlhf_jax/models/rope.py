"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) as published models use them.

All of a head or its first part is rotated, pairs are halves or neighbours, and frequencies may be
lowered for texts longer than those of pretraining.
"""

import math

import jax.numpy as jnp
from jaxtyping import Float, Int

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import Array

SinCos = tuple[Float[Array, "B S half"], Float[Array, "B S half"]]


def rope(positions: Int[Array, "B S"], config: ModelConfig, *, local: bool = False) -> SinCos:
    """sin and cos of the angles position · f_i with f_i = θ^(-2i/R), i < R/2 (eq. 15), where R is
    the number of rotated elements of a head.

    Args:
        local: the angles of layers with a window, which may have a θ of their own.
    """
    own = local and config.rope_theta_local > 0
    theta = config.rope_theta_local if own else config.rope_theta
    exponents = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
    frequencies = theta**-exponents
    if not own:
        frequencies = scaled(frequencies, config)
    angles = jnp.einsum("bs,i->bsi", positions.astype(jnp.float32), frequencies)
    return jnp.sin(angles), jnp.cos(angles)


def scaled(frequencies: Float[Array, " half"], config: ModelConfig) -> Float[Array, " half"]:
    """Frequencies after ``config.rope_scaling``.

    "linear": all divided by the factor s. "llama3" (Dubey et al. 2024,
    https://arxiv.org/abs/2407.21783, section 3.4.1; as in transformers): with N the length of
    pretraining and λ = 2π/f, unchanged where λ < N/high, f/s where λ > N/low, and between them
    (1 - a) f/s + a f with a = (N/λ - low) / (high - low).
    """
    if config.rope_scaling == "none":
        return frequencies
    lowered = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return lowered
    low, high, length = config.rope_low, config.rope_high, config.rope_original
    turns = length * frequencies / (2 * math.pi)  # N/λ, how often one turns in pretraining
    share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - share) * lowered + share * frequencies


def rotate(
    x: Float[Array, "B S N Dh"], rotary: SinCos, *, interleaved: bool = False
) -> Float[Array, "B S N Dh"]:
    """Rotates pairs of the first R elements; elements from R on stay.

    Pairs are (i, i + R/2), the half-split order of most published checkpoints, or the paper's
    neighbours (2i, 2i + 1) if `interleaved`.
    """
    sin, cos = (part[:, :, None, :] for part in rotary)
    size = 2 * sin.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = jnp.split(rotated, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        out = jnp.stack(turned, axis=-1).reshape(rotated.shape)
    else:
        out = jnp.concatenate(turned, axis=-1)
    return out if rest.shape[-1] == 0 else jnp.concatenate([out, rest], axis=-1)
