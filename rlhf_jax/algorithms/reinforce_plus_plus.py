"""REINFORCE++: PPO without a critic; returns are compared with those of the whole batch.

Hu 2025, https://arxiv.org/abs/2501.03262, equations 5 to 9.

    r_t = process_t + outcome at the last token − β KL_t        (minus the group's mean of Σ_t r_t,
    G_t = Σ_{u ≥ t} r_u                                          at the last token: "baseline" form)
    A   = (G − mean_batch) / std_batch        over the valid tokens of the batch
    L   = −mean over tokens of min(ρ A, clip(ρ) A)

It differs from PPO in the missing critic and from GRPO in that the scale is that of the batch, so
a group of almost equal samples is not blown up.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import (
    drivable,
    driven,
    penalised_scores,
    policy_terms,
    sequence_rewards,
    token_rewards,
)
from rlhf_jax.ops import groups, masking
from rlhf_jax.ops.returns import discounted_returns
from rlhf_jax.ops.surrogate import Surrogate, check_surrogate
from rlhf_jax.types import Algorithm, Needs, Targets

BASELINES = ("none", "group")


def reinforce_plus_plus(
    *,
    baseline: str = "none",
    gamma: float | int = 1.0,
    kl_coef: float | int = 0.01,
    kl_estimator: str = "k1",
    kl_place: str = "reward",
    clip_low: float | int = 0.2,
    clip_high: float | int = 0.2,
    entropy_coef: float | int = 0.0,
) -> Algorithm:
    """REINFORCE with PPO's clip and advantages whitened over the batch.

    Args:
        baseline: "none", or "group" to take off the group's mean first (REINFORCE++-baseline; the
            paper then has ``kl_place="loss"`` with ``kl_estimator="k2"``).
        gamma: discount per token.
        kl_coef: β per nat of divergence from the reference; 0 needs no reference.
        kl_estimator: "k1", "k2", "k3" or "k3+".
        kl_place: "reward" or "loss".
        clip_low: ε below 1 of the ratio.
        clip_high: ε above 1.
        entropy_coef: weight of the entropy bonus, per nat; 0 leaves the term out.

    Example:
        >>> reinforce_plus_plus(baseline="group").needs.min_group
        2
    """
    if baseline not in BASELINES:
        raise ValueError(f"unknown baseline {baseline!r}; known: {', '.join(BASELINES)}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}; wanted a number from 0 to 1")
    surrogate = Surrogate(
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_place=kl_place,
        entropy_coef=entropy_coef,
    )
    check_surrogate(surrogate)

    @jax.named_scope("reinforce_plus_plus_targets")
    def targets(experience, group_size, state):
        mask = experience.rollouts.mask
        beta = driven(experience, surrogate.reward_kl)
        rewards = token_rewards(experience, kl_coef=beta, estimator=kl_estimator)
        if baseline == "group":
            totals = sequence_rewards(penalised_scores(experience, surrogate), mask)
            rewards = rewards - masking.place_at_last(groups.group_mean(totals, group_size), mask)
        returns = discounted_returns(rewards, mask, gamma=gamma)
        advantages = masking.whiten(returns, mask)
        return Targets(advantages=advantages, returns=returns, mask=jnp.asarray(mask)), state

    @jax.named_scope("reinforce_plus_plus_loss")
    def loss(output, experience, targets, group_size):
        del group_size
        return policy_terms(output, experience, targets, surrogate)

    needs = Needs(reference=kl_coef != 0, min_group=2 if baseline == "group" else 1)
    made = Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs)
    return made._replace(kl_coef=drivable(kl_coef))
