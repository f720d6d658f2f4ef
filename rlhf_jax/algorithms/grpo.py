"""GRPO: the other samples of the same prompt are the baseline; there is no critic.

Shao et al. 2024, https://arxiv.org/abs/2402.03300, equation 3 and section 4.1.2.

    r_i = outcome_i + Σ_t process_it
    A_i = (r_i − mean_g) / (std_g + 1e-6)      for every token of completion i
    L   = mean_i mean_t [ −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) + β k3 ]

It differs from PPO in the baseline and in the KL, which stands in the loss and is
differentiated. Two clips instead of one are from DAPO (Yu et al. 2025,
https://arxiv.org/abs/2503.14476). Relatives by configuration: Dr. GRPO (Liu et al. 2025,
https://arxiv.org/abs/2503.20783) is ``scale="none"``, ``kl_coef=0`` and
``aggregate="sequence_mean_token_sum_norm"`` with a constant.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import policy_metrics, sequence_rewards
from rlhf_jax.ops import groups, surrogate
from rlhf_jax.ops.divergence import check_estimator, kl_estimate
from rlhf_jax.types import Algorithm, Needs, Targets, Term

SCALES = ("std", "none")


def grpo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl_coef: float = 0.001,
    kl_estimator: str = "k3",
    scale: str = "std",
    aggregate: str = "sequence_mean_token_mean",
    constant: float | None = None,
) -> Algorithm:
    """Group-relative policy optimisation.

    Args:
        clip_low: ε below 1 of the ratio.
        clip_high: ε above 1; larger than `clip_low` lets unlikely tokens rise.
        kl_coef: β, weight of the KL term per nat; 0 leaves it out and needs no reference.
        kl_estimator: "k1", "k2" or "k3"; note that k1's gradient is not that of the KL.
        scale: "std" divides by the group's standard deviation, "none" does not.
        aggregate: one of `ops.surrogate.AGGREGATIONS`.
        constant: tokens; only for "sequence_mean_token_sum_norm".

    Example:
        >>> algorithm = grpo(kl_coef=0.0)
        >>> algorithm.needs.reference, algorithm.needs.min_group
        (False, 2)
    """
    check_estimator(kl_estimator)
    surrogate.check_aggregation(aggregate, constant)
    if scale not in SCALES:
        raise ValueError(f"grpo: unknown scale {scale!r}; known: {', '.join(SCALES)}")

    @jax.named_scope("grpo_targets")
    def targets(experience, group_size, state):
        mask = experience.rollouts.mask
        rewards = sequence_rewards(experience.scores, mask)
        if scale == "std":
            advantages = groups.group_zscore(rewards, group_size)
        else:
            advantages = rewards - groups.group_mean(rewards, group_size)
        advantages = jnp.where(mask, advantages[:, None], 0.0)
        returns = jnp.where(mask, rewards[:, None], 0.0)
        return Targets(advantages=advantages, returns=returns, mask=jnp.asarray(mask)), state

    @jax.named_scope("grpo_loss")
    def loss(output, experience, targets, group_size):
        del group_size  # the comparison within groups is made; tokens are on their own now
        experience, targets = jax.lax.stop_gradient((experience, targets))
        mask = targets.mask
        (logprobs,) = surrogate.filled(mask, output.logprobs)
        old_logprobs, ref_logprobs, advantages = surrogate.filled(
            mask, experience.logprobs, experience.ref_logprobs, targets.advantages
        )
        policy, clipped, ratio = surrogate.clipped_surrogate(
            logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high
        )

        def mean(x):
            return surrogate.aggregate(x, mask, aggregate, constant=constant)

        terms = {"policy": Term(weight=1.0, mean=mean(policy))}
        if kl_coef:
            kl = kl_estimate(logprobs, ref_logprobs, kl_estimator)
            terms["kl"] = Term(weight=kl_coef, mean=mean(kl))
        return terms, policy_metrics(output, clipped, ratio, mask)

    needs = Needs(reference=kl_coef != 0, min_group=2)
    return Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs)
