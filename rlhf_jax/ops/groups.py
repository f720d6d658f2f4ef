"""Groups: the K samples of one prompt are K consecutive rows, and chunks never cut a group."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from rlhf_jax.ops.masking import fill_padding, masked_mean
from rlhf_jax.types import Array


def split_chunks(tree: Any, chunks: int, group: int = 1) -> Any:
    """Splits the rows of every leaf into chunks that hold whole groups.

    [R, ...] -> [chunks, R/chunks, ...]; chunk j holds the groups j, j + chunks, j + 2·chunks...

    Strided, not contiguous: where consecutive rows lie on different devices, every chunk then
    has rows of every device, and splitting moves nothing between them.

    Args:
        tree: arrays with the rows as leading axis.
        chunks: number of chunks; must divide the number of groups.
        group: rows per group (1 for leaves with one row per prompt).

    Raises:
        ValueError: the rows are not a multiple of chunks · group.
    """

    def split(x):
        rows = x.shape[0]
        if rows % (chunks * group):
            raise ValueError(
                f"{rows} rows do not split into {chunks} chunks of whole groups of {group}; "
                f"wanted a multiple of {chunks * group}"
            )
        x = jnp.reshape(x, (rows // (chunks * group), chunks, group, *x.shape[1:]))
        return jnp.reshape(jnp.swapaxes(x, 0, 1), (chunks, rows // chunks, *x.shape[3:]))

    return jax.tree.map(split, tree)


def join_chunks(tree: Any, group: int = 1) -> Any:
    """The inverse of `split_chunks`: [chunks, R/chunks, ...] -> [R, ...] in the old order."""

    def join(x):
        chunks, rows = x.shape[:2]
        if rows % group:
            raise ValueError(f"chunks of {rows} rows do not hold whole groups of {group}")
        x = jnp.reshape(x, (chunks, rows // group, group, *x.shape[2:]))
        return jnp.reshape(jnp.swapaxes(x, 0, 1), (chunks * rows, *x.shape[3:]))

    return jax.tree.map(join, tree)


def repeat_groups(x: Shaped[Array, "N ..."], group_size: int) -> Shaped[Array, "B ..."]:
    """Repeats every row K times, as neighbours: one row per prompt to one per rollout."""
    return jnp.repeat(x, group_size, axis=0)


def group_mean(x: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """The mean of each group, at every row of it. Exact where a group's values are equal."""
    return jnp.reshape(_mean(_groups(x, group_size)), x.shape)


def group_std(x: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Population standard deviation of each group, sqrt(mean((x − mean x)²)), at every row.

    Exactly 0 where a group's values are equal; its gradient there is 0, not NaN.
    """
    grouped = _groups(x, group_size)
    variance = jnp.mean(jnp.square(grouped - _mean(grouped)), axis=1, keepdims=True)
    spread = variance > 0
    std = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)
    return jnp.reshape(jnp.broadcast_to(std, grouped.shape), x.shape)


def masked_group_stats(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], group_size: int
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Mean and population standard deviation over all true entries of a group, at every entry.

    Of entries that are all equal the mean is that very value and the deviation exactly 0; of no
    entries both are 0.
    """
    if x.shape[0] % group_size:
        raise ValueError(f"{x.shape[0]} rows are not whole groups of {group_size}")
    shape = (x.shape[0] // group_size, group_size * x.shape[1])
    entries = jnp.reshape(fill_padding(x, mask), shape).astype(jnp.float32)
    inside = jnp.reshape(jnp.asarray(mask), shape)
    # Around the largest: sums of differences that are 0 stay 0, as in `_mean`.
    top = jnp.max(jnp.where(inside, entries, -jnp.inf), axis=1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    mean = top + masked_mean(entries - top, inside, axis=1)[:, None]
    variance = masked_mean(jnp.square(entries - mean), inside, axis=1)[:, None]
    varies = variance > 0
    std = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)
    return tuple(jnp.reshape(jnp.broadcast_to(s, shape), x.shape) for s in (mean, std))


def group_zscore(
    x: Float[Array, " B"], group_size: int, *, eps: float = 1e-6
) -> Float[Array, " B"]:
    """(x − group mean) / (group std + eps); exactly 0 where a group's values are equal.

    Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2. The standard deviation is
    the population's; implementations that use the sample's give advantages smaller by
    sqrt((K−1)/K).
    """
    return (x - group_mean(x, group_size)) / (group_std(x, group_size) + eps)


def leave_one_out(x: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """x minus the mean of the *other* members of its group: K/(K−1) · (x − group mean).

    Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, equation 7.
    """
    if group_size < 2:
        raise ValueError(f"leave_one_out needs groups of 2 or more, got group_size={group_size}")
    return (x - group_mean(x, group_size)) * (group_size / (group_size - 1))


def best_of_group(x: Float[Array, " B"], group_size: int) -> Bool[Array, " B"]:
    """True at the row with the largest value of each group; the first of equal ones."""
    return _one_per_group(jnp.argmax(_groups(x, group_size), axis=1), group_size)


def worst_of_group(x: Float[Array, " B"], group_size: int) -> Bool[Array, " B"]:
    """True at the row with the smallest value of each group; the first of equal ones."""
    return _one_per_group(jnp.argmin(_groups(x, group_size), axis=1), group_size)


def _groups(x, group_size):
    """[B] -> [N K]."""
    if x.shape[0] % group_size:
        raise ValueError(f"{x.shape[0]} rows are not whole groups of {group_size}")
    return jnp.reshape(x, (x.shape[0] // group_size, group_size))


def _mean(grouped):
    """[N K] -> [N K]. Around the first member: equal values then give that very value, so that
    a group without signal has advantages of exactly 0, not rounding noise over eps."""
    first = grouped[:, :1]
    mean = first + jnp.mean(grouped - first, axis=1, keepdims=True)
    return jnp.broadcast_to(mean, grouped.shape)


def _one_per_group(choice, group_size):
    """[N] -> Bool[B]: one_hot, flattened."""
    return jnp.reshape(jax.nn.one_hot(choice, group_size, dtype=bool), (-1,))
