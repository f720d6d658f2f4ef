"""Rewards of length alone: a price per token, or a length to aim at."""

import jax.numpy as jnp

from rlhf_jax.rewards.base import device_reward
from rlhf_jax.types import Reward


def length(
    *, per_token: float | int | None = None, free: int | None = None, target: int | None = None
) -> Reward:
    """outcome = per_token · max(0, tokens − free), or 1 − |tokens / target − 1|.

    The second is the reward of LPPO (Singhal et al. 2023, https://arxiv.org/abs/2310.03716; targets
    of 156, 250 and 120 tokens there): 1 at the target, 0 without tokens and at twice as many,
    below 0 beyond. The end-of-text token counts.

    Args:
        per_token: score of each token beyond `free`, -0.01 if left out; negative makes completions
            shorter.
        free: tokens that cost nothing, 0 if left out.
        target: the length to aim at, in place of both.

    Example:
        >>> price = length(per_token=-0.01, free=64)
    """
    if target is None:
        price = -0.01 if per_token is None else per_token
        allowed = 0 if free is None else free
        if allowed < 0:
            raise ValueError(f"length: free={free}, wanted 0 or more tokens")
        return device_reward("length", lambda r: price * jnp.maximum(_tokens(r) - allowed, 0.0))
    if target < 1:
        raise ValueError(f"length: target={target}, wanted 1 or more tokens")
    if per_token is not None or free is not None:
        raise ValueError(
            f"length: target={target} beside per_token={per_token} and free={free}; wanted the "
            "target alone, or no target"
        )
    return device_reward("length", lambda r: 1 - jnp.abs(_tokens(r) / target - 1))


def _tokens(rollouts):
    return jnp.sum(rollouts.mask, axis=-1, dtype=jnp.float32)
