"""Masked reductions. Everything goes through `where`, never through multiplication.

``nan * 0`` is ``nan``, so a product with the mask would let whatever stands in padding into
sums. `where` keeps it out of values; it keeps it out of gradients only if the padding is filled
*before* a non-linear function is applied (the derivative at the padding would be ``0 * nan``).
So functions here fill first and compute after.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from rlhf_jax.types import Array, Mean

Axis = int | tuple[int, ...] | None
_WHITEN_EPS = 1e-8  # variance of rewards of order 1 is far above; keeps constant inputs finite


def fill_padding(
    x: Shaped[Array, "*S"], mask: Bool[Array, "*S"], value: float | int = 0
) -> Shaped[Array, "*S"]:
    """Returns x where the mask is true and `value` elsewhere, in x's dtype."""
    x = jnp.asarray(x)  # host arrays of 64 bits become 32 here, as everywhere in jax
    return jnp.where(mask, x, jnp.asarray(value, x.dtype))


def masked_sum(
    x: Shaped[Array, "*S"], mask: Bool[Array, "*S"], axis: Axis = None
) -> Float[Array, "..."]:
    """Sum of x over the entries where the mask is true, in float32."""
    return jnp.sum(fill_padding(x, mask).astype(jnp.float32), axis=axis)


def masked_count(mask: Bool[Array, "*S"], axis: Axis = None) -> Float[Array, "..."]:
    """Number of true entries, in float32 (exact up to 2^24)."""
    return jnp.sum(mask, axis=axis, dtype=jnp.float32)


def masked_mean(
    x: Shaped[Array, "*S"], mask: Bool[Array, "*S"], axis: Axis = None
) -> Float[Array, "..."]:
    """Mean of x over the true entries; 0 where there are none."""
    return masked_sum(x, mask, axis) / jnp.maximum(masked_count(mask, axis), 1.0)


def masked_var(
    x: Shaped[Array, "*S"], mask: Bool[Array, "*S"], axis: Axis = None
) -> Float[Array, "..."]:
    """Population variance of x over the true entries, mean((x − mean x)²); 0 if there are none.

    In two passes, so that a large mean does not cancel the digits of a small variance.
    """
    x = fill_padding(x, mask).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(mask, axis=axis, keepdims=True, dtype=jnp.float32), 1.0)
    mean = jnp.sum(x, axis=axis, keepdims=True) / count
    return masked_mean(jnp.square(x - mean), mask, axis)


def whiten(
    x: Float[Array, "*S"], mask: Bool[Array, "*S"], *, shift_mean: bool = True
) -> Float[Array, "*S"]:
    """Scales the true entries of x to variance 1 and (with `shift_mean`) mean 0; padding is 0.

    y = (x − mean x) / sqrt(var x + 1e-8)  over all true entries of all axes; exactly 0 where they
    are all equal.

    Without `shift_mean` the mean is left where it was: only the spread is scaled.
    """
    x = fill_padding(x, mask).astype(jnp.float32)
    # Around the largest: the mean of equal numbers is not that number in float32, and what is
    # left of the difference over 1e-4 would be an advantage.
    top = jax.lax.stop_gradient(jnp.max(x, where=mask, initial=-jnp.inf))
    top = jnp.where(jnp.any(mask), top, 0.0)
    x = x - _like(top, x)
    mean = masked_mean(x, mask)
    centred = x - _like(mean, x)
    scaled = centred * _like(jax.lax.rsqrt(masked_var(x, mask) + _WHITEN_EPS), x)
    if not shift_mean:
        scaled = scaled + _like(mean + top, x)
    return fill_padding(scaled, mask)


def last_true(mask: Bool[Array, "*B T"]) -> Bool[Array, "*B T"]:
    """True at the last true entry of each row; a row without one stays false."""
    position = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    last = jnp.max(jnp.where(mask, position, -1), axis=-1, keepdims=True)
    return jnp.asarray(mask) & (position == last)


def place_at_last(values: Float[Array, "*B"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Writes each row's value at the row's last true entry, zeros elsewhere.

    A row without a true entry is all zeros, whatever its value.
    """
    values = jnp.asarray(values)
    return jnp.where(last_true(mask), values[..., None], jnp.zeros((), values.dtype))


def mean_of(x: Shaped[Array, "*S"], mask: Bool[Array, "*S"]) -> Mean:
    """The mean of x over the true entries as total and count (numbers or truth values)."""
    return Mean(total=masked_sum(x, mask), count=masked_count(mask))


def _like(scalar, x):
    """A scalar with the rank of x: rank promotion is an error in the tests."""
    return jnp.reshape(scalar, (1,) * x.ndim)
