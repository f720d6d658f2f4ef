"""Dr. GRPO: GRPO without its two biases, division by the length and by the group's deviation.

Liu et al. 2025, https://arxiv.org/abs/2503.20783, equation 3.

    A_i = r_i − mean_g
    L   = −mean_i (1 / constant) Σ_t min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)

It differs from GRPO in that a wrong answer does not get cheaper per token by being long, and that
very easy and very hard prompts do not weigh more. `constant` is the paper's generation budget.
"""

from rlhf_jax.algorithms.base import group_relative
from rlhf_jax.ops.surrogate import Surrogate
from rlhf_jax.types import Algorithm


def dr_grpo(
    *,
    constant: float | int = 3000,
    clip_low: float | int = 0.2,
    clip_high: float | int = 0.2,
    kl_coef: float | int = 0.0,
    kl_estimator: str = "k3",
) -> Algorithm:
    """GRPO done right.

    Args:
        constant: tokens that a sum over a completion is divided by, 3000 in the paper; best the
            run's ``rollout.max_tokens``. It scales the gradient, so the learning rate goes with it.
        clip_low: ε below 1 of the ratio.
        clip_high: ε above 1.
        kl_coef: β of the KL term per nat; the paper leaves it out.
        kl_estimator: "k1", "k2", "k3" or "k3+".

    Example:
        >>> dr_grpo(constant=512).needs.reference
        False
    """
    surrogate = Surrogate(
        clip_low=clip_low,
        clip_high=clip_high,
        aggregate="sequence_mean_token_sum_norm",
        constant=constant,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    return group_relative(surrogate, scale="none")
