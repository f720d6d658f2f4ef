"""RLOO: plain REINFORCE of whole completions; the baseline is the mean of the others.

Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, equation 7.

    R_i = r_i − β Σ_t KL_t
    A_i = R_i − mean of the other K − 1 of its group = K / (K − 1) (R_i − mean_g)
    L   = −mean_i A_i Σ_t log π(y_it)

It differs from GRPO in the baseline (unbiased, undivided), in the KL, which stands in the reward,
and in that there is no ratio: one step per batch. ``form="clip"`` is what libraries ship for more
than one.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import (
    drivable,
    penalised_scores,
    policy_terms,
    sequence_rewards,
    spread,
)
from rlhf_jax.ops import groups
from rlhf_jax.ops.surrogate import Surrogate, check_surrogate
from rlhf_jax.types import Algorithm, Needs, Targets


def rloo(
    *,
    kl_coef: float | int = 0.03,
    kl_estimator: str = "k1",
    form: str = "reinforce",
    clip_low: float | int = 0.2,
    clip_high: float | int = 0.2,
    aggregate: str = "sequence_mean_token_sum",
    constant: float | int | None = None,
) -> Algorithm:
    """REINFORCE with a leave-one-out baseline.

    Args:
        kl_coef: β, reward per nat of divergence from the reference; 0 needs no reference.
        kl_estimator: "k1", "k2", "k3" or "k3+" (which in a reward is k3).
        form: "reinforce", "clip" or "cispo"; see `ops.surrogate.Surrogate`.
        clip_low: ε below 1 of the ratio, for "clip".
        clip_high: ε above 1, for "clip" and "cispo".
        aggregate: one of `ops.surrogate.AGGREGATIONS`.
        constant: tokens; only for "sequence_mean_token_sum_norm".

    Example:
        >>> algorithm = rloo(kl_coef=0.05)
        >>> algorithm.needs.reference, algorithm.needs.min_group
        (True, 2)
    """
    surrogate = Surrogate(
        clip_low=clip_low,
        clip_high=clip_high,
        form=form,
        aggregate=aggregate,
        constant=constant,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_place="reward",
    )
    check_surrogate(surrogate)

    @jax.named_scope("rloo_targets")
    def targets(experience, group_size, state):
        mask = experience.rollouts.mask
        rewards = sequence_rewards(penalised_scores(experience, surrogate), mask)
        advantages = spread(groups.leave_one_out(rewards, group_size), mask)
        returns = spread(rewards, mask)
        return Targets(advantages=advantages, returns=returns, mask=jnp.asarray(mask)), state

    @jax.named_scope("rloo_loss")
    def loss(output, experience, targets, group_size):
        del group_size
        return policy_terms(output, experience, targets, surrogate)

    needs = Needs(reference=kl_coef != 0, min_group=2)
    made = Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs)
    return made._replace(kl_coef=drivable(kl_coef))
