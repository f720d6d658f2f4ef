"""PRIME: the outcome beside the other samples', and what each token adds, by a model that learns.

Cui et al. 2025, https://arxiv.org/abs/2502.01456.

    A_it = o_i − mean of the other K − 1 outcomes of its group
         + c Σ_{u ≥ t} γ^(u−t) (p_iu − b_i),    b_i = mean over j ≠ i of mean_u p_ju
    L    = mean over tokens of  −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)

with o the outcome scores, such as a checker's, and p the process scores of tokens, such as those of
`rewards.implicit_model`. That b is taken off every token, and by a mean over completions of means
over tokens, is our reading. A sum of p that pays the same for every token of a group is then worth
nothing, whatever the lengths.

It differs from RLOO in that tokens of one completion have advantages of their own, and from GRPO
with ``credit="steps"`` in the baseline, which leaves the own completion out, and in that nothing is
divided by a deviation. The paper's filter of prompts is the wrapper
``select=dict(how="range", reward=..., low=0.2, high=0.8)``.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import drivable, policy_terms, spread
from rlhf_jax.ops import groups
from rlhf_jax.ops.masking import masked_mean
from rlhf_jax.ops.returns import discounted_returns
from rlhf_jax.ops.surrogate import Surrogate, check_surrogate, filled
from rlhf_jax.types import Algorithm, Needs, Targets


def prime(
    *,
    coef: float | int = 5.0,
    gamma: float | int = 1.0,
    clip_low: float | int = 0.2,
    clip_high: float | int = 0.2,
    aggregate: str = "token_mean",
    constant: float | int | None = None,
    kl_coef: float | int = 0.0,
    kl_estimator: str = "k3",
) -> Algorithm:
    """Leave-one-out outcomes and the returns of process scores, in a clipped surrogate.

    Args:
        coef: c, what a unit of process score weighs beside one of outcome, on top of the reward's
            own weight.
        gamma: discount per token of process scores.
        clip_low: ε below 1 of the ratio.
        clip_high: ε above 1.
        aggregate: one of `ops.surrogate.AGGREGATIONS`.
        constant: tokens; only for "sequence_mean_token_sum_norm".
        kl_coef: β of the KL in the loss, per nat; 0 leaves it out and needs no reference.
        kl_estimator: "k1", "k2", "k3" or "k3+".

    Example:
        >>> algorithm = prime(coef=1.0)
        >>> algorithm.needs.process, algorithm.needs.min_group
        (True, 2)
    """
    surrogate = Surrogate(
        clip_low=clip_low,
        clip_high=clip_high,
        aggregate=aggregate,
        constant=constant,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    check_surrogate(surrogate)
    if not coef > 0:
        raise ValueError(f"coef={coef}; wanted more than 0: without process scores this is 'rloo'")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}; wanted a number from 0 to 1")

    @jax.named_scope("prime_targets")
    def targets(experience, group_size, state):
        mask = jnp.asarray(experience.rollouts.mask)
        outcome = experience.scores.outcome.astype(jnp.float32)
        (process,) = filled(mask, experience.scores.process)
        mean = masked_mean(process, mask, axis=-1)
        others = mean - groups.leave_one_out(mean, group_size)
        gained = coef * discounted_returns(process - others[:, None], mask, gamma=gamma)
        advantages = spread(groups.leave_one_out(outcome, group_size), mask) + gained
        returns = spread(outcome, mask) + coef * discounted_returns(process, mask, gamma=gamma)
        return Targets(advantages=advantages, returns=returns, mask=mask), state

    @jax.named_scope("prime_loss")
    def loss(output, experience, targets, group_size):
        del group_size  # the comparison within groups is made; tokens are on their own now
        return policy_terms(output, experience, targets, surrogate)

    needs = Needs(reference=kl_coef != 0, process=True, min_group=2)
    made = Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs)
    return made._replace(kl_coef=drivable(kl_coef))
