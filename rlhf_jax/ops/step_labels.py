"""Labels of steps from sampled continuations, and one score of a solution from those of its steps.

Math-Shepherd (Wang et al. 2023, https://arxiv.org/abs/2312.08935): N continuations of the prefix
that ends with step s say whether s is on a way to the right answer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.masking import fill_padding, last_true, masked_mean, masked_sum
from rlhf_jax.types import Array

Aggregate = Callable[[Float[Array, "*B T"], Bool[Array, "*B T"]], Float[Array, "*B"]]


def hard_labels(right: Bool[Array, "*S N"]) -> Float[Array, "*S"]:
    """1 where any of the N continuations of a step is right, else 0 ("hard estimation").

    A wrong step gets 1 as soon as one continuation mends it, so more continuations are not always
    better: the best N is larger for a weaker policy.
    """
    _check_outcomes(right)
    return jnp.any(right, axis=-1).astype(jnp.float32)


def soft_labels(right: Bool[Array, "*S N"]) -> Float[Array, "*S"]:
    """The share of the N continuations of a step that are right ("soft estimation")."""
    _check_outcomes(right)
    return jnp.mean(right, axis=-1, dtype=jnp.float32)


def _check_outcomes(right):
    if not right.shape[-1]:
        raise ValueError(f"outcomes of shape {right.shape}; wanted 1 or more for each step")


def _least(logits, ends):
    lowest = jnp.min(fill_padding(logits, ends, jnp.inf), axis=-1)
    return jax.nn.sigmoid(lowest)


def _product(logits, ends):
    """As a sum of logarithms: a hundred good steps are not lost in the rounding of a product."""
    return jnp.exp(masked_sum(jax.nn.log_sigmoid(fill_padding(logits, ends)), ends, axis=-1))


def _mean(logits, ends):
    return masked_mean(jax.nn.sigmoid(fill_padding(logits, ends)), ends, axis=-1)


def _last(logits, ends):
    return jax.nn.sigmoid(masked_sum(logits, last_true(ends), axis=-1))


def _sum(logits, ends):
    return masked_sum(logits, ends, axis=-1)


AGGREGATES: dict[str, Aggregate] = {
    "min": _least,
    "product": _product,
    "mean": _mean,
    "last": _last,
    "sum": _sum,
}


def check_how(how: str) -> None:
    """Raises a ValueError for a way of aggregating that is not known."""
    if how not in AGGREGATES:
        raise ValueError(
            f"how={how!r} is no way to aggregate steps; known: {', '.join(AGGREGATES)}"
        )


def aggregate(
    logits: Float[Array, "*B T"], ends: Bool[Array, "*B T"], *, how: str
) -> Float[Array, "*B"]:
    """One score of each row from the logits r_s of its steps, to rank solutions by.

        min      min_s σ(r_s)       the weakest step decides (Math-Shepherd)
        product  Π_s σ(r_s)         all steps are right, were they independent
                                    (Lightman et al. 2023, https://arxiv.org/abs/2305.20050)
        mean     1/S Σ_s σ(r_s)     length does not count
        last     σ(r_S)
        sum      Σ_s r_s            log-odds: all steps right against all of them wrong

    Only `sum` is no probability. A row without steps has no score: it is NaN.

    Args:
        logits: one number where a step ends; anything elsewhere.
        ends: where steps end.
        how: one of `AGGREGATES`.

    Example:
        >>> aggregate(jnp.array([[0.0, 9.0, 2.0]]), jnp.array([[True, False, True]]), how="min")
        Array([0.5], dtype=float32)
    """
    check_how(how)
    scores = AGGREGATES[how](jnp.asarray(logits, jnp.float32), ends)
    return jnp.where(jnp.any(ends, axis=-1), scores, jnp.nan)
