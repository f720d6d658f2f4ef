"""Expert iteration: imitate the samples that are good enough, as many as there are of a prompt.

Anthony et al. 2017, https://arxiv.org/abs/1705.08439; for language models ReST-EM, Singh et al.
2023, https://arxiv.org/abs/2312.06585.

    D   = completions with r(x, y) > threshold, at most `most` of a prompt
    L   = −mean over the tokens of D of log π

The expert is the policy with a verifier: it samples (the step's rollouts), what the verifier passes
becomes data, and the policy is fitted to it for `updates.epochs` passes. It differs from best-of-n
in that a prompt of which nothing is right teaches nothing, and one of which all is right teaches
all of it. The policy goes on from where it is; ReST-EM fits the base anew in each of its few
rounds.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import or_nan, part_of, policy_terms, sequence_rewards, spread
from rlhf_jax.ops.masking import mean_of
from rlhf_jax.ops.surrogate import Surrogate, check_surrogate
from rlhf_jax.types import Algorithm, Needs, Targets


def expert_iteration(
    *,
    threshold: float | int = 0.5,
    reward: str | None = None,
    most: int | None = None,
    aggregate: str = "token_mean",
    constant: float | int | None = None,
) -> Algorithm:
    """Imitation of all samples above a threshold.

    Args:
        threshold: a score above it is good enough; 0.5 for verifiers that say 0 or 1.
        reward: label of the reward whose unweighted scores decide; None is the whole reward.
        most: of each prompt, the first so many that are good enough; None is all. Else prompts
            that are easy fill the data.
        aggregate: one of `ops.surrogate.AGGREGATIONS`.
        constant: tokens; only for "sequence_mean_token_sum_norm".

    Example:
        >>> expert_iteration(most=4).needs.min_group
        1
    """
    if most is not None and most < 1:
        raise ValueError(f"most={most}; wanted 1 or more samples of a prompt, or None")
    surrogate = Surrogate(form="reinforce", aggregate=aggregate, constant=constant)
    check_surrogate(surrogate)

    @jax.named_scope("expert_iteration_targets")
    def targets(experience, group_size, state):
        mask = jnp.asarray(experience.rollouts.mask)
        rewards = sequence_rewards(experience.scores, mask)
        judged = (
            rewards if reward is None else part_of(experience.scores, reward, "expert_iteration")
        )
        good = (judged > threshold) & jnp.any(mask, axis=-1)
        if most is not None:
            number = jnp.cumsum(jnp.reshape(good, (-1, group_size)), axis=1)
            good = good & jnp.reshape(number <= most, (-1,))
        # A score that is no number is above no threshold, and would be passed over in silence.
        weight = or_nan(good.astype(jnp.float32), judged, group_size)
        advantages = spread(weight, mask)
        kept = mask & (advantages != 0)
        return Targets(advantages=advantages, returns=spread(rewards, mask), mask=kept), state

    @jax.named_scope("expert_iteration_loss")
    def loss(output, experience, targets, group_size):
        del group_size
        terms, metrics = policy_terms(output, experience, targets, surrogate)
        rows = jnp.any(jnp.asarray(experience.rollouts.mask), axis=-1)
        kept = mean_of(jnp.any(targets.mask, axis=-1).astype(jnp.float32), rows)
        return terms, {**metrics, "policy/imitated": kept}

    wraps = ("omit_truncated", "select")
    return Algorithm(init=lambda: (), targets=targets, loss=loss, needs=Needs(), wraps=wraps)
