"""GSPO: the ratio and its clip belong to the sequence, as the reward does.

Zheng et al. 2025, https://arxiv.org/abs/2507.18071, equations 5 to 7.

    s_i = (π(y_i) / π_old(y_i))^(1/|y_i|)
    L   = −mean_i min(s_i A_i, clip(s_i, 1 − ε_low, 1 + ε_high) A_i),   A as in GRPO

It differs from GRPO in that all tokens of a completion are clipped together or not at all. The
ratio is a geometric mean, hence the small ε.
"""

from rlhf_jax.algorithms.base import group_relative
from rlhf_jax.ops.surrogate import Surrogate
from rlhf_jax.types import Algorithm


def gspo(
    *,
    clip_low: float | int = 3e-4,
    clip_high: float | int = 4e-4,
    kl_coef: float | int = 0.0,
    kl_estimator: str = "k3",
) -> Algorithm:
    """Group sequence policy optimisation.

    Args:
        clip_low: ε below 1 of the sequence's ratio.
        clip_high: ε above 1.
        kl_coef: β of the KL term per nat; the paper leaves it out.
        kl_estimator: "k1", "k2", "k3" or "k3+".

    Example:
        >>> gspo().needs.min_group
        2
    """
    surrogate = Surrogate(
        clip_low=clip_low,
        clip_high=clip_high,
        ratio="sequence",
        aggregate="sequence_mean_token_mean",
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    return group_relative(surrogate)
