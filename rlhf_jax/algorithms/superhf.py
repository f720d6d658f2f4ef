"""SuperHF: supervised learning on the best sample of each group, held near the reference.

Mukobi et al. 2023, https://arxiv.org/abs/2310.16763, section 3 and algorithm 1.

    y*  = the best of the K samples of a prompt
    L   = −mean_t log π(y*_t) + β mean_t KL_t

The first mean is over the tokens of the chosen completions, the second over those of all K. The
paper's KL(π ‖ π_ref) is a sum over the vocabulary at the tokens of y*, which a step that never
holds [B, T, V] does not have. It is estimated from log-probs, by default by k2,
½ (log π − log π_ref)²: never negative (the paper's max(0, ·) is in it), and with the KL's own
gradient for samples of π. Those are all K and not the chosen ones: k2 on these alone holds back
what they should teach (tests/worlds/superhf_test.py). It differs from best-of-n in that term.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import (
    drivable,
    driven,
    imitated,
    policy_metrics,
    sequence_rewards,
    spread,
)
from rlhf_jax.ops import surrogate
from rlhf_jax.ops.divergence import kl_estimate
from rlhf_jax.types import Algorithm, Needs, Targets, Term


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
    values = surrogate.Surrogate(
        aggregate=aggregate, constant=constant, kl_coef=kl_coef, kl_estimator=kl_estimator
    )
    surrogate.check_surrogate(values)

    @jax.named_scope("superhf_targets")
    def targets(experience, group_size, state):
        mask = jnp.asarray(experience.rollouts.mask)
        rewards = sequence_rewards(experience.scores, mask)
        advantages = spread(imitated(rewards, group_size), mask)
        return Targets(advantages=advantages, returns=spread(rewards, mask), mask=mask), state

    @jax.named_scope("superhf_loss")
    def loss(output, experience, targets, group_size):
        del group_size
        experience, targets = jax.lax.stop_gradient((experience, targets))
        mask = targets.mask
        logprobs, reference, old, chosen = surrogate.filled(
            mask, output.logprobs, experience.ref_logprobs, experience.logprobs, targets.advantages
        )

        def mean(x, where):
            return surrogate.aggregate(x, where, aggregate, constant=constant)

        likelihood = mean(-chosen * logprobs, mask & (chosen != 0))
        terms = {"policy": Term(weight=1.0, mean=likelihood)}
        if kl_coef:
            kl = kl_estimate(logprobs, reference, kl_estimator)
            terms["kl"] = Term(weight=driven(experience, kl_coef), mean=mean(kl, mask))
        ratio = surrogate.policy_ratio(logprobs, old, mask, "token")
        return terms, policy_metrics(output, jnp.zeros(mask.shape, bool), ratio, mask)

    needs = Needs(reference=kl_coef != 0, min_group=2)
    wraps = ("omit_truncated", "select")
    made = Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs, wraps=wraps)
    return made._replace(kl_coef=drivable(kl_coef))
