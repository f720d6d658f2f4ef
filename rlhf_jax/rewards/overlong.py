"""DAPO's soft penalty of completions that come close to the longest one that is wanted."""

import jax.numpy as jnp

from rlhf_jax.rewards.base import device_reward
from rlhf_jax.types import Reward


def overlong(*, limit: int, buffer: int) -> Reward:
    """0 up to limit − buffer tokens, falling in a line to −1 at `limit`, −1 beyond.

        outcome = clip((limit − buffer − tokens) / buffer, −1, 0)

    Yu et al. 2025, https://arxiv.org/abs/2503.14476, equation 13, where limit = 20,480 and
    buffer = 4,096. The end-of-text token counts. A limit of `rollout.max_tokens` gives −1 to what
    ran into it.

    Args:
        limit: tokens from which on the penalty is whole.
        buffer: tokens over which it falls; at most `limit`.

    Example:
        >>> soft = overlong(limit=20480, buffer=4096)
    """
    if limit < 1 or not 0 < buffer <= limit:
        raise ValueError(
            f"overlong: limit={limit} and buffer={buffer}; wanted a limit of 1 or more tokens and "
            "a buffer from 1 to the limit"
        )

    def penalty(rollouts):
        tokens = jnp.sum(rollouts.mask, axis=-1, dtype=jnp.float32)
        return jnp.clip((limit - buffer - tokens) / buffer, -1.0, 0.0)

    return device_reward("overlong", penalty)
