"""Metrics are dictionaries of `Mean`: totals and counts that add up exactly.

Means of means weigh a short microbatch like a long one; a total and a count do not. So metrics
stay totals and counts through microbatches, minibatches and hosts, and are divided once, when
somebody reads them.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax.types import Array, Mean, Metrics


def add(a: Metrics, b: Metrics) -> Metrics:
    """Adds totals and counts name by name; a name in only one of the two is taken over."""
    result = dict(a)
    for name, mean in b.items():
        if name in result:
            result[name] = Mean(
                total=result[name].total + mean.total, count=result[name].count + mean.count
            )
        else:
            result[name] = mean
    return result


def value(mean: Mean) -> Float[Array, ""]:
    """total / count. An empty mean (count 0) is NaN: "never measured" is not the number 0.

    For readers of metrics only, so it divides on the host: on a device the division would wait
    behind the step that was dispatched since. A loss with count 0 is 0 and must be built with
    `masking.masked_mean` or a guarded division instead.
    """
    total, count = np.asarray(mean.total), np.asarray(mean.count)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count != 0)


def values(metrics: Metrics) -> dict[str, Float[Array, ""]]:
    """`value` of every metric."""
    return {name: value(mean) for name, mean in metrics.items()}


def scale(mean: Mean, factor: Float[Array, ""] | float) -> Mean:
    """The mean times `factor`: the total is scaled, the count stays."""
    return Mean(total=mean.total * factor, count=mean.count)


def single(x: Float[Array, ""] | float) -> Mean:
    """One number as a mean of count 1."""
    return Mean(total=jnp.asarray(x, jnp.float32), count=jnp.ones((), jnp.float32))


def with_prefix(prefix: str, metrics: Metrics) -> Metrics:
    """Puts "prefix/" before every name."""
    return {f"{prefix}/{name}": mean for name, mean in metrics.items()}


def names(metrics: Metrics, prefix: str = "") -> list[str]:
    """The names that begin with `prefix`, sorted."""
    return sorted(name for name in metrics if name.startswith(prefix))
