"""Best-of-n training (RAFT, rejection sampling): imitate the best sample of each group.

Dong et al. 2023, RAFT, https://arxiv.org/abs/2304.06767, algorithm 1; Touvron et al. 2023,
https://arxiv.org/abs/2307.09288, section 3.2.3.

    L = −mean over the tokens of the chosen completions of log π

The expected reward rises as that of best-of-n sampling does, without its cost at inference. It
differs from SuperHF in that nothing holds the policy to the reference.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import imitated, policy_terms, sequence_rewards, spread
from rlhf_jax.ops.surrogate import Surrogate, check_surrogate
from rlhf_jax.types import Algorithm, Needs, Targets


def best_of_n(*, aggregate: str = "token_mean", constant: float | int | None = None) -> Algorithm:
    """Imitation of the best of each group; the first of equal ones.

    Args:
        aggregate: one of `ops.surrogate.AGGREGATIONS`.
        constant: tokens; only for "sequence_mean_token_sum_norm".

    Example:
        >>> best_of_n().needs.min_group
        2
    """
    surrogate = Surrogate(form="reinforce", aggregate=aggregate, constant=constant)
    check_surrogate(surrogate)

    @jax.named_scope("best_of_n_targets")
    def targets(experience, group_size, state):
        mask = jnp.asarray(experience.rollouts.mask)
        rewards = sequence_rewards(experience.scores, mask)
        advantages = spread(imitated(rewards, group_size), mask)
        returns = spread(rewards, mask)
        return Targets(advantages=advantages, returns=returns, mask=mask & (advantages != 0)), state

    @jax.named_scope("best_of_n_loss")
    def loss(output, experience, targets, group_size):
        del group_size
        return policy_terms(output, experience, targets, surrogate)

    needs, wraps = Needs(min_group=2), ("omit_truncated", "select")
    return Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs, wraps=wraps)
