"""KL-anchored REINFORCE with a learned baseline, as in PE-RLHF.

Sidahmed et al. 2024, https://arxiv.org/abs/2403.10704, section 2.2 (there with low-rank adapters on
one frozen base; here with any trees).

    R   = (1 − β) r − β Σ_t (log π − log π_ref)
    L   = −mean_i Σ_t (R − V_t) log π(y_t) + c_V mean_i Σ_t (V_t − R)²

The whole return stands at every token. (1 − β) changes the optimum: it is
π_ref exp(r (1 − β)/β), so the temperature is β/(1 − β). It differs from PPO in that there is no
ratio, no λ and no whitening: one step per batch.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import (
    drivable,
    driven,
    policy_terms,
    sequence_kl,
    sequence_rewards,
    spread,
)
from rlhf_jax.ops import masking, surrogate
from rlhf_jax.types import Algorithm, Needs, Targets, Term

_MOST = 0.99  # of a driven β: at 1 nothing of the reward would be left


def pe_reinforce(
    *,
    kl_coef: float | int = 0.05,
    value_coef: float | int = 1.0,
    aggregate: str = "sequence_mean_token_sum",
    constant: float | int | None = None,
) -> Algorithm:
    """REINFORCE with a value baseline and a KL anchor.

    Args:
        kl_coef: β from 0 to below 1: the share of the reward that is the anchor's.
        value_coef: c_V, weight of the value term.
        aggregate: one of `ops.surrogate.AGGREGATIONS`, of policy and value terms.
        constant: tokens; only for "sequence_mean_token_sum_norm".

    Example:
        >>> algorithm = pe_reinforce(kl_coef=0.1)
        >>> algorithm.needs.value, algorithm.needs.reference
        (True, True)
    """
    if not 0 <= kl_coef < 1:
        raise ValueError(f"kl_coef={kl_coef}; wanted a share of the reward, from 0 to below 1")
    if not value_coef >= 0:
        raise ValueError(f"value_coef={value_coef}; wanted 0 or more")
    values = surrogate.Surrogate(form="reinforce", aggregate=aggregate, constant=constant)
    surrogate.check_surrogate(values)

    @jax.named_scope("pe_reinforce_targets")
    def targets(experience, group_size, state):
        del group_size
        mask = experience.rollouts.mask
        beta = driven(experience, kl_coef)
        rewards = (1 - beta) * sequence_rewards(experience.scores, mask)
        if kl_coef:
            rewards = rewards - beta * sequence_kl(experience, "k1")
        returns = spread(rewards, mask)
        (old_values,) = surrogate.filled(mask, experience.values)
        advantages = jnp.where(mask, returns - old_values, 0.0)
        return Targets(advantages=advantages, returns=returns, mask=jnp.asarray(mask)), state

    @jax.named_scope("pe_reinforce_loss")
    def loss(output, experience, targets, group_size):
        del group_size
        terms, metrics = policy_terms(output, experience, targets, values)
        mask = targets.mask
        predicted, returns = surrogate.filled(mask, output.scores["value"], targets.returns)
        error = jnp.square(predicted - jax.lax.stop_gradient(returns))
        mean = surrogate.aggregate(error, mask, aggregate, constant=constant)
        terms["value"] = Term(weight=value_coef, mean=mean)
        return terms, metrics | {"value/squared_error": masking.mean_of(error, mask)}

    needs = Needs(value=True, reference=kl_coef != 0)
    made = Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs)
    return made._replace(kl_coef=drivable(kl_coef, most=_MOST))
