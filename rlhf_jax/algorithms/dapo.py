"""DAPO: GRPO with a higher clip, token-level loss, no KL, and groups without signal drawn again.

Yu et al. 2025, https://arxiv.org/abs/2503.14476, equations 8 to 12.

    A_i = (r_i − mean_g) / (std_g + 1e-6)
    L   = −(1 / Σ_i |y_i|) Σ_i Σ_t min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)

It differs from GRPO in ε_high > ε_low, in that every token of the batch weighs the same, and in
`wrappers.select`: groups whose rewards are all equal give way to further draws, up to
``rollout.max_draws`` of them. The paper's soft penalty for long answers is the reward `overlong`;
leaving cut-off answers out is the key ``omit_truncated``.
"""

from rlhf_jax.algorithms.base import group_relative
from rlhf_jax.algorithms.wrappers import select
from rlhf_jax.ops.surrogate import Surrogate
from rlhf_jax.types import Algorithm


def dapo(
    *,
    clip_low: float | int = 0.2,
    clip_high: float | int = 0.28,
    kl_coef: float | int = 0.0,
    kl_estimator: str = "k3",
) -> Algorithm:
    """Decoupled clip and dynamic sampling policy optimisation.

    Args:
        clip_low: ε below 1 of the ratio.
        clip_high: ε above 1.
        kl_coef: β of the KL term per nat; the paper leaves it out.
        kl_estimator: "k1", "k2", "k3" or "k3+".

    Example:
        >>> algorithm = dapo()
        >>> algorithm.select is not None
        True
    """
    surrogate = Surrogate(
        clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef, kl_estimator=kl_estimator
    )
    return select(group_relative(surrogate), how="signal")
