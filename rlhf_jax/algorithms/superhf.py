"""SuperHF: supervised learning on the best sample of each group, held near the reference.

Mukobi et al. 2023, https://arxiv.org/abs/2310.16763, section 3 and algorithm 1.

    y*  = the best of the K samples of a prompt
    L   = −mean_t log π(y*_t) + β mean_t KL_t      over the tokens of the chosen completions

The paper's KL(π ‖ π_ref) over y* is estimated from the log-probs of y* itself, by default by k2,
½ (log π − log π_ref)², whose gradient is the KL's own for samples of π and never negative (the
paper's max(0, ·) is in it). It differs from best-of-n in that term.
"""

import jax

from rlhf_jax.algorithms.base import imitation, policy_terms, sequence_rewards
from rlhf_jax.ops import groups
from rlhf_jax.ops.surrogate import Surrogate, check_surrogate
from rlhf_jax.types import Algorithm, Needs


def superhf(
    *,
    kl_coef: float | int = 0.35,
    kl_estimator: str = "k2",
    aggregate: str = "token_mean",
    constant: float | int | None = None,
) -> Algorithm:
    """Supervised human feedback: filter by reward, imitate, penalise divergence.

    Args:
        kl_coef: β of the KL term per nat; the paper's code has 0.35. 0 needs no reference.
        kl_estimator: "k2", "k3" or "k3+". The gradient of k1 is that of the likelihood with the
            sign turned, so β would only be a smaller learning rate; that of k3 is bounded by it,
            so with β < 1 it cannot hold the policy.
        aggregate: one of `ops.surrogate.AGGREGATIONS`.
        constant: tokens; only for "sequence_mean_token_sum_norm".

    Example:
        >>> algorithm = superhf(kl_coef=0.1)
        >>> algorithm.needs.reference, algorithm.needs.min_group
        (True, 2)
    """
    if kl_estimator == "k1":
        raise ValueError(
            "kl_estimator='k1': its gradient on the chosen samples is the likelihood's with the "
            "sign turned, which holds nothing; set 'k2'"
        )
    surrogate = Surrogate(
        form="reinforce",
        aggregate=aggregate,
        constant=constant,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    check_surrogate(surrogate)

    @jax.named_scope("superhf_targets")
    def targets(experience, group_size, state):
        rewards = sequence_rewards(experience.scores, experience.rollouts.mask)
        best = groups.best_of_group(rewards, group_size)
        return imitation(experience, best, rewards), state

    @jax.named_scope("superhf_loss")
    def loss(output, experience, targets, group_size):
        del group_size
        return policy_terms(output, experience, targets, surrogate)

    needs = Needs(reference=kl_coef != 0, min_group=2)
    return Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs)
