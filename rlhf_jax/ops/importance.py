"""Weights for samples of one policy in the update of another: π_old(y) / π_roll(y), held.

π_roll is what was sampled from (`Rollouts.behaviour_logprobs`: numerics, truncation and version of
the sampler), π_old what the trainer says of the same tokens before the update
(`Experience.logprobs`). The ratio of the surrogate, π_θ / π_old, is another one: with both, the
three policies are those of the decoupled objective, Hilton et al. 2022,
https://arxiv.org/abs/2110.00641.
"""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.ops.surrogate import filled
from rlhf_jax.types import Array

_MAX_LOG_WEIGHT = 20.0  # exp(20) = 5e8: far outside any bound, far inside float32
# By name: the bounds that are usual. None: the bound that this way does not have.
BOUNDS = {
    "tis": (None, 2.0),
    "sequence_tis": (None, 2.0),
    "token_mask": (0.5, 2.0),
    "sequence_mask": (0.0, 3.0),
}


def log_weights(
    logprobs: Float[Array, "B T"],
    behaviour_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """log w_t = log π_old(y_t) − log π_roll(y_t) in nats; 0 in padding."""
    old, rolled = filled(mask, logprobs, behaviour_logprobs)
    return old - rolled


def held_weights(
    log_weight: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    how: str,
    low: float | int | None,
    high: float | int,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """(weight, held) per token: what the advantage is multiplied by, and where a bound acted.

        tis            min(w_t, high)
        token_mask     w_t if low ≤ w_t ≤ high, else 0
        sequence_tis   min(w, high)                         w = Π_t w_t, one for all tokens of a row
        sequence_mask  w if low ≤ w ≤ high, else 0

    In padding the weight of a token is 1, and nothing is held.
    """
    if how.startswith("sequence"):
        total = masked_sum(log_weight, mask, axis=-1)
        log_weight = jnp.where(mask, total[:, None], 0.0)
    weight = jnp.exp(jnp.clip(log_weight, -_MAX_LOG_WEIGHT, _MAX_LOG_WEIGHT))
    if how.endswith("mask"):
        held = mask & ((weight < low) | (weight > high))
        return jnp.where(held, 0.0, weight), held
    return jnp.minimum(weight, high), mask & (weight > high)


def check_bounds(
    how: str, low: float | int | None, high: float | int | None
) -> tuple[float | int | None, float | int]:
    """(low, high), the usual ones where they are left out.

    Raises:
        ValueError: for an unknown `how`, a bound that it does not have, or bounds that would act
            on the weight 1, where sampler and trainer agree.
    """
    if how not in BOUNDS:
        raise ValueError(f"how={how!r} is unknown; known: {', '.join(BOUNDS)}")
    usual_low, usual_high = BOUNDS[how]
    if usual_low is None and low is not None:
        raise ValueError(f"low={low}, but {how} only holds weights from above; leave low out")
    low = usual_low if low is None else low
    high = usual_high if high is None else high
    if not 0 <= (low or 0.0) <= 1 <= high < float("inf"):
        raise ValueError(
            f"low={low} and high={high}; wanted 0 <= low <= 1 <= high: the weight is 1 where "
            "sampler and trainer agree"
        )
    return low, high
