"""Several reward models as one: scores of E members on one scale, combined, and their spread.

Members of an ensemble agree where the data spoke and differ where it did not, so a policy that
is paid less where they differ is led astray later. They err together too: ensembles delay
over-optimisation and do not remove it (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244).

The member axis E leads in every array.
"""

import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.types import Array

HOWS = ("mean", "lcb", "worst", "uwo")
_FLAT = 1e-6  # a spread below this is a constant score, which is centred but not scaled


def member_statistics(
    scores: Float[Array, "E B"],
) -> tuple[Float[Array, " E"], Float[Array, " E"]]:
    """Mean and standard deviation of each member over reference completions, to be frozen.

    A member that is constant there gets the deviation 1: it is centred and not scaled.
    """
    scores = scores.astype(jnp.float32)
    std = jnp.std(scores, axis=1)
    return jnp.mean(scores, axis=1), jnp.where(std > _FLAT, std, 1.0)


def standardise_members(
    scores: Float[Array, "E *B"], mean: Float[Array, " E"], std: Float[Array, " E"]
) -> Float[Array, "E *B"]:
    """(r_e − mean_e) / std_e: puts members on one scale.

    Preferences leave each member's offset and scale free; left as they are, the worst case is
    decided by whoever has the lowest offset.
    """
    lead = (scores.shape[0],) + (1,) * (scores.ndim - 1)
    return (scores.astype(jnp.float32) - jnp.reshape(mean, lead)) / jnp.reshape(std, lead)


def disagreement(scores: Float[Array, "E *B"]) -> Float[Array, "*B"]:
    """std_e r_e, the population standard deviation over the members; 0 of one member."""
    return jnp.std(scores.astype(jnp.float32), axis=0)


def combine_members(
    scores: Float[Array, "E *B"], how: str, *, coef: float | int = 0.5
) -> Float[Array, "*B"]:
    """One score from those of the members.

        "mean"    mean_e r_e                      (Zhang et al. 2024,
        "lcb"     mean_e r_e − coef · std_e r_e    https://arxiv.org/abs/2401.16635)
        "worst"   min_e r_e                       (Coste et al. 2023,
        "uwo"     mean_e r_e − coef · var_e r_e    https://arxiv.org/abs/2310.02743, section 3)

    Deviation and variance are those of the population of E members. With one member all four are
    that member. Coste et al. take coef = 0.5 for best-of-n and 0.1 for PPO.

    Raises:
        ValueError: for another `how`, or a negative `coef`.
    """
    if how not in HOWS:
        raise ValueError(f"how={how!r}; known: {', '.join(HOWS)}")
    if coef < 0:
        raise ValueError(f"coef={coef}; wanted 0 or more: a negative one would pay for doubt")
    scores = scores.astype(jnp.float32)
    if how == "worst":
        return jnp.min(scores, axis=0)
    mean = jnp.mean(scores, axis=0)
    if how == "lcb":
        return mean - coef * disagreement(scores)
    return mean - coef * jnp.var(scores, axis=0) if how == "uwo" else mean
