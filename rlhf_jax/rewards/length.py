"""A price on length: a score per token beyond a free allowance."""

import jax.numpy as jnp

from rlhf_jax.rewards.base import device_reward
from rlhf_jax.types import Reward


def length(*, per_token: float | int = -0.01, free: int = 0) -> Reward:
    """outcome = per_token · max(0, tokens − free).

    Args:
        per_token: score of each token beyond `free`; negative makes completions shorter.
        free: tokens that cost nothing, the end-of-text token included.

    Example:
        >>> price = length(per_token=-0.01, free=64)
    """
    if free < 0:
        raise ValueError(f"length: free={free}, wanted 0 or more tokens")

    def score(rollouts):
        tokens = jnp.sum(rollouts.mask, axis=-1, dtype=jnp.float32)
        return per_token * jnp.maximum(tokens - free, 0.0)

    return device_reward("length", score)
