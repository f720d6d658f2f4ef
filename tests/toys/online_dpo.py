"""Online DPO (Guo et al. 2024, arXiv 2402.04792) as a toy: best against worst of each group."""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import sequence_rewards
from rlhf_jax.ops import groups, masking
from rlhf_jax.types import Algorithm, Mean, Needs, Targets, Term


def online_dpo(*, beta: float = 0.1) -> Algorithm:
    def targets(experience, group_size, state):
        mask = experience.rollouts.mask
        rewards = sequence_rewards(experience.scores, mask)
        best = groups.best_of_group(rewards, group_size)
        worst = groups.worst_of_group(rewards, group_size)
        decided = best != worst  # a group whose rewards are all equal has no pair
        sign = jnp.where(decided, jnp.where(best, 1.0, -1.0), 0.0) * (best | worst)
        signs = jnp.where(mask, sign[:, None], 0.0)
        return Targets(advantages=signs, returns=signs, mask=mask & (signs != 0)), state

    def loss(output, experience, targets, group_size):
        ratio = output.logprobs - experience.ref_logprobs
        signed = masking.masked_sum(ratio * targets.advantages, targets.mask, axis=-1)
        margin = signed.reshape(-1, group_size).sum(-1)  # best minus worst, whole groups
        pairs = targets.mask.any(-1).reshape(-1, group_size).any(-1)
        error = jnp.where(pairs, -jax.nn.log_sigmoid(beta * margin), 0.0)
        return {
            "dpo": Term(weight=1.0, mean=Mean(total=error.sum(), count=pairs.sum() * 1.0)),
        }, {}

    return Algorithm(lambda: (), targets, loss, Needs(reference=True, min_group=2))
