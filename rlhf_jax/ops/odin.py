"""ODIN: quality and length as two heads of one reward model, which are kept apart.

Chen et al. 2024, "ODIN: Disentangled Reward Mitigates Hacking in RLHF",
https://arxiv.org/abs/2402.07319. Pairs are explained by the sum of both heads, the length head is
drawn towards the number of tokens |y| and the quality head away from it:

    L = −log σ(d_Q + d_L) + λ_L (|ρ(r_Q, |y|)| − ρ(r_L, |y|)) + λ_O |w_Q · w_L|

d are differences of better and worse, ρ is Pearson's correlation over all answers of a batch, w are
the heads' weights. A policy is paid by r_Q alone.

ρ is a statistic of the whole batch. Its derivative in one score is

    ∂ρ/∂r_i = z_i / n,     z_i = [(l_i − l̄) / s_l − ρ (r_i − r̄) / s_r] / s_r

and needs of the others nothing but means, deviations and ρ, the `Moments`. With these from a pass
over the batch without gradients, the mean of ρ + z_i (r_i − sg r_i) over answers has the value and
the gradient of ρ, however the batch is cut into parts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.masking import masked_mean, masked_var
from rlhf_jax.pytree import pytree
from rlhf_jax.types import Array


class Odin(NamedTuple):
    """The weights of the losses, checked by `odin`: λ_L and λ_O."""

    length_coef: float | int
    orthogonal_coef: float | int


def odin(*, length_coef: float = 1.0, orthogonal_coef: float = 1.0) -> Odin:
    """The weights of the losses.

    Raises:
        ValueError: for a negative one.
    """
    for name, value in (("length_coef", length_coef), ("orthogonal_coef", orthogonal_coef)):
        if not value >= 0:
            raise ValueError(f"{name}={value}; wanted 0 (off) or more, such as 1.0")
    return Odin(length_coef, orthogonal_coef)


@pytree
class Moments:
    """What ρ of all scores and lengths is made of: population means and deviations. `varies` is 0
    where scores or lengths are all the same; ρ is 0 then, and has no slope."""

    score: Float[Array, ""]
    score_std: Float[Array, ""]
    length: Float[Array, ""]
    length_std: Float[Array, ""]
    correlation: Float[Array, ""]
    varies: Bool[Array, ""]


def moments(
    scores: Float[Array, " M"], lengths: Float[Array, " M"], present: Bool[Array, " M"]
) -> Moments:
    """The moments over the entries that are present; no gradient goes through them."""
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    lengths = lengths.astype(jnp.float32)

    def spread(x):
        # Compared as they are: after the mean is taken off, rounding looks like variation.
        top = jnp.max(x, where=present, initial=-jnp.inf)
        return top > jnp.min(x, where=present, initial=jnp.inf)

    varies = spread(scores) & spread(lengths)
    stds = [jnp.sqrt(jnp.where(varies, masked_var(x, present), 1.0)) for x in (scores, lengths)]
    means = [masked_mean(x, present) for x in (scores, lengths)]
    product = (scores - means[0][None]) * (lengths - means[1][None])
    correlation = masked_mean(product, present) / (stds[0] * stds[1])
    return Moments(
        score=means[0],
        score_std=stds[0],
        length=means[1],
        length_std=stds[1],
        correlation=jnp.where(varies, correlation, 0.0),
        varies=varies,
    )


def correlated(
    found: Moments, scores: Float[Array, " M"], lengths: Float[Array, " M"]
) -> Float[Array, " M"]:
    """ρ + z_i (r_i − sg r_i): numbers whose mean over all answers of the batch is ρ, and whose
    gradient is that of ρ."""
    scores = scores.astype(jnp.float32)
    still = jax.lax.stop_gradient(scores)
    found = jax.tree.map(lambda x: x[None], found)
    far = (lengths.astype(jnp.float32) - found.length) / found.length_std
    far = far - found.correlation * (still - found.score) / found.score_std
    slope = jnp.where(found.varies, far / found.score_std, 0.0)
    return found.correlation + slope * (scores - still)


def overlap(quality: Float[Array, " D"], length: Float[Array, " D"]) -> Float[Array, ""]:
    """|w_Q · w_L|, in float32."""
    return jnp.abs(jnp.sum(quality.astype(jnp.float32) * length.astype(jnp.float32)))
