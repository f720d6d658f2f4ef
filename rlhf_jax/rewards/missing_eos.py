"""The price of a completion that ran into the token limit without an end-of-text token."""

import jax.numpy as jnp

from rlhf_jax.rewards.base import device_reward
from rlhf_jax.types import Reward


def missing_eos(*, penalty: float | int = -1.0) -> Reward:
    """outcome = penalty where a completion is truncated, 0 where it ended by itself.

    The "EOS trick" of Huang et al. 2024, https://arxiv.org/abs/2403.17031, where the score
    *becomes* −1; here the penalty is added to what the other rewards say, as all rewards are, which
    keeps their order among truncated completions.

    Example:
        >>> price = missing_eos(penalty=-1.0)
    """
    if not penalty < 0:
        raise ValueError(
            f"missing_eos: penalty={penalty}, wanted a number below 0; for none leave it out"
        )
    return device_reward(
        "missing_eos", lambda rollouts: penalty * jnp.asarray(rollouts.truncated, jnp.float32)
    )
