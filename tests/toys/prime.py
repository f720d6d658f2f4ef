"""PRIME (Cui et al. 2025, arXiv 2502.01456) as a toy: leave-one-out outcome + implicit process."""

import jax.numpy as jnp

from rlhf_jax.ops import groups, masking
from rlhf_jax.ops.returns import reward_to_go
from rlhf_jax.ops.surrogate import Surrogate, aggregate, policy_loss
from rlhf_jax.types import Algorithm, Needs, Targets, Term


def prime(*, clip: float = 0.2) -> Algorithm:
    def targets(experience, group_size, state):
        mask = experience.rollouts.mask
        outcome = groups.leave_one_out(experience.scores.outcome, group_size)
        to_go = reward_to_go(experience.scores.process, mask)
        advantages = jnp.where(mask, outcome[:, None] + to_go, 0.0)
        return Targets(advantages=advantages, returns=advantages, mask=mask), state

    def loss(output, experience, targets, group_size):
        policy, clipped, _ = policy_loss(
            output.logprobs,
            experience.logprobs,
            targets.advantages,
            targets.mask,
            Surrogate(clip_low=clip, clip_high=clip),
        )
        mean = aggregate(policy, targets.mask, "token_mean")
        clipped = masking.mean_of(clipped, targets.mask)
        return {"policy": Term(weight=1.0, mean=mean)}, {"policy/clip_fraction": clipped}

    return Algorithm(lambda: (), targets, loss, Needs(min_group=2))
