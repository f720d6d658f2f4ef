"""CISPO: the clip weighs a token's gradient and never takes it away.

MiniMax 2025, https://arxiv.org/abs/2506.13585, equations 4 and 5; ε_high = 5 is the setting of
Khatri et al. 2025 (ScaleRL), https://arxiv.org/abs/2510.13786.

    L = −(1 / Σ_i |y_i|) Σ_i Σ_t sg(min(ρ, 1 + ε_high)) A log π,   A as in GRPO

It differs from DAPO where the ratio is beyond 1 + ε_high: PPO's minimum silences that token, here
it keeps the weight 1 + ε_high. There is no clip below.
"""

from rlhf_jax.algorithms.base import group_relative
from rlhf_jax.ops.surrogate import Surrogate
from rlhf_jax.types import Algorithm


def cispo(
    *, clip_high: float | int = 5.0, kl_coef: float | int = 0.0, kl_estimator: str = "k3"
) -> Algorithm:
    """Clipped importance-sampling-weight policy optimisation.

    Args:
        clip_high: ε above 1 of the weight.
        kl_coef: β of the KL term per nat; the paper leaves it out.
        kl_estimator: "k1", "k2", "k3" or "k3+".

    Example:
        >>> cispo(clip_high=4.0).needs.value
        False
    """
    surrogate = Surrogate(
        form="cispo", clip_high=clip_high, kl_coef=kl_coef, kl_estimator=kl_estimator
    )
    return group_relative(surrogate)
