"""Dynamic sampling (Yu et al. 2025, arXiv 2503.14476) as a toy: GRPO on groups with signal."""

import jax.numpy as jnp

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.types import Algorithm


def dynamic(*, kl_coef: float = 0.001) -> Algorithm:
    def select(scores, group_size):
        grouped = (scores.outcome + scores.process.sum(-1)).reshape(-1, group_size)
        return jnp.max(grouped, axis=1) > jnp.min(grouped, axis=1)

    return grpo(kl_coef=kl_coef)._replace(select=select)
