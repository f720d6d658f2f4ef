"""SuperHF (Mukobi et al. 2023, arXiv 2310.16763) as a toy: the best of each group is imitated."""

import jax.numpy as jnp

from rlhf_jax.algorithms.base import sequence_rewards
from rlhf_jax.ops import groups, masking
from rlhf_jax.ops.divergence import kl_estimate
from rlhf_jax.ops.surrogate import filled
from rlhf_jax.types import Algorithm, Needs, Targets, Term


def superhf(*, kl_coef: float = 0.01) -> Algorithm:
    def targets(experience, group_size, state):
        mask = experience.rollouts.mask
        rewards = sequence_rewards(experience.scores, mask)
        best = groups.best_of_group(rewards, group_size)[:, None] & mask
        ones = jnp.where(best, 1.0, 0.0)
        return Targets(advantages=ones, returns=ones, mask=best), state

    def loss(output, experience, targets, group_size):
        mask = experience.rollouts.mask
        logprobs, reference = filled(mask, output.logprobs, experience.ref_logprobs)
        kl = kl_estimate(logprobs, reference, "k2")
        return {
            "nll": Term(weight=1.0, mean=masking.mean_of(-logprobs, targets.mask)),
            "kl": Term(weight=kl_coef, mean=masking.mean_of(kl, targets.mask)),
        }, {}

    return Algorithm(lambda: (), targets, loss, Needs(reference=True, min_group=2))
