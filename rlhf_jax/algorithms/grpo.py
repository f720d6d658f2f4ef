"""GRPO: the other samples of the same prompt are the baseline; there is no critic.

Shao et al. 2024, https://arxiv.org/abs/2402.03300, equation 3 and section 4.1.2.

    r_i = outcome_i + Σ_t process_it
    A_i = (r_i − mean_g) / (std_g + 1e-6)      for every token of completion i
    L   = mean_i mean_t [ −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) + β k3 ]

It differs from PPO in the baseline and in the KL, which stands in the loss and is
differentiated. Two clips instead of one are from DAPO. This is the general form of the family,
with every value of `ops.surrogate.Surrogate`; `dr_grpo`, `dapo`, `gspo` and `cispo` are the papers'
choices of them.
"""

from rlhf_jax.algorithms.base import group_relative
from rlhf_jax.ops.surrogate import Surrogate
from rlhf_jax.types import Algorithm


def grpo(
    *,
    clip_low: float | int = 0.2,
    clip_high: float | int = 0.28,
    dual_clip: float | int | None = None,
    kl_coef: float | int = 0.001,
    kl_estimator: str = "k3",
    kl_place: str = "loss",
    kl_weighted: bool = False,
    entropy_coef: float | int = 0.0,
    ratio: str = "token",
    form: str = "clip",
    scale: str = "std",
    credit: str = "sequence",
    aggregate: str = "sequence_mean_token_mean",
    constant: float | int | None = None,
) -> Algorithm:
    """Group-relative policy optimisation.

    Args:
        clip_low: ε below 1 of the ratio.
        clip_high: ε above 1; larger than `clip_low` lets unlikely tokens rise.
        dual_clip: largest ratio that counts where the advantage is negative; None = off.
        kl_coef: β, weight of the KL per nat; 0 leaves it out and needs no reference.
        kl_estimator: "k1", "k2", "k3" or "k3+"; `ops.divergence` says what their gradients are.
        kl_place: "loss", or "reward" to take the KL off the rewards.
        kl_weighted: weighs the KL term by the ratio.
        entropy_coef: weight of the entropy bonus, per nat; 0 leaves the term out.
        ratio: "token", or "sequence" for the geometric mean over the tokens.
        form: "clip", "cispo" or "reinforce"; see `ops.surrogate.Surrogate`.
        scale: "std" divides by the group's standard deviation, "none" does not.
        credit: "sequence", or "steps" for process scores that train only what led to them.
        aggregate: one of `ops.surrogate.AGGREGATIONS`.
        constant: tokens; only for "sequence_mean_token_sum_norm".

    Example:
        >>> algorithm = grpo(kl_coef=0.0)
        >>> algorithm.needs.reference, algorithm.needs.min_group
        (False, 2)
    """
    surrogate = Surrogate(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio=ratio,
        form=form,
        aggregate=aggregate,
        constant=constant,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_place=kl_place,
        kl_weighted=kl_weighted,
        entropy_coef=entropy_coef,
    )
    return group_relative(surrogate, scale=scale, credit=credit)
