"""A reward with a known optimum: the share of one token among a completion's tokens."""

import jax.numpy as jnp

from rlhf_jax.ops import masking
from rlhf_jax.rewards.base import device_reward
from rlhf_jax.types import Reward


def likes(*, token: int) -> Reward:
    def share(rollouts):
        hits = jnp.where(rollouts.tokens == token, 1.0, 0.0)
        return masking.masked_mean(hits, rollouts.mask, axis=-1)

    return device_reward("likes", share)
