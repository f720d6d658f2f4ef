"""The clipped objectives of PPO and its descendants, per token, and how tokens are averaged.

Nothing here knows padding except `aggregate`: callers fill padding (`masking.fill_padding`)
before these functions, so that no NaN enters a derivative.
"""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.masking import fill_padding, masked_mean, masked_sum, mean_of
from rlhf_jax.types import Array, Mean

AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
)
_MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: every clip has long since acted, and float32 is safe


def clipped_surrogate(
    logprobs: Float[Array, "*B T"],
    old_logprobs: Float[Array, "*B T"],
    advantages: Float[Array, "*B T"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Array, "*B T"], Bool[Array, "*B T"], Float[Array, "*B T"]]:
    """Returns (loss, clipped, ratio) per token.

    ρ = exp(log π − log π_old);  J = min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A);  loss = −J

    With `dual_clip` = c, J is at least c A where A < 0 (Ye et al. 2020,
    https://arxiv.org/abs/1912.09729, equation 5): a very unlikely token that became likely
    cannot dominate the batch. `clipped` is true where a clip has cut the gradient off.

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7; two clips as in
    Yu et al. 2025, https://arxiv.org/abs/2503.14476, equation 10.
    """
    difference = logprobs.astype(jnp.float32) - old_logprobs.astype(jnp.float32)
    ratio = jnp.exp(jnp.clip(difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    plain = ratio * advantages
    cut = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = jnp.minimum(plain, cut)
    clipped = cut < plain
    if dual_clip is not None:
        floor = dual_clip * advantages
        floored = (advantages < 0) & (objective < floor)
        objective = jnp.where(floored, floor, objective)
        clipped = clipped | floored
    return -objective, clipped, ratio


def value_error(
    values: Float[Array, "*B T"],
    old_values: Float[Array, "*B T"],
    returns: Float[Array, "*B T"],
    *,
    clip: float | None,
) -> Float[Array, "*B T"]:
    """½ max((V − R)², (clip(V, V_old − c, V_old + c) − R)²) per token; clip None: ½ (V − R)².

    The maximum makes the clip pessimistic: it stops a value that moved away from its old one
    in the direction of the return, never one that moved the wrong way.
    """
    error = jnp.square(values - returns)
    if clip is not None:
        near = jnp.clip(values, old_values - clip, old_values + clip)
        error = jnp.maximum(error, jnp.square(near - returns))
    return 0.5 * error


def aggregate(
    x: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    how: str,
    *,
    constant: float | None = None,
) -> Mean:
    """How per-token losses become one number; the count never depends on x.

    token_mean                    Σ x m / Σ m                  every token weighs the same
    sequence_mean_token_mean      mean_i(Σ_t x m / Σ_t m)      every sequence weighs the same
    sequence_mean_token_sum       mean_i(Σ_t x m)              long sequences weigh more
    sequence_mean_token_sum_norm  mean_i(Σ_t x m / constant)   the same, in units of a constant

    Sequences without a valid token are not counted.

    Raises:
        ValueError: unknown `how`, or a constant that is missing or not used.
    """
    check_aggregation(how, constant)
    if how == "token_mean":
        return mean_of(x, mask)
    present = jnp.any(mask, axis=-1)
    if how == "sequence_mean_token_mean":
        return mean_of(masked_mean(x, mask, axis=-1), present)
    total = mean_of(masked_sum(x, mask, axis=-1), present)
    if how == "sequence_mean_token_sum_norm":
        return Mean(total=total.total / constant, count=total.count)
    return total


def check_aggregation(how: str, constant: float | None) -> None:
    """Raises ValueError unless `aggregate` takes this pair."""
    if how not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {how!r}; known: {', '.join(AGGREGATIONS)}")
    needs_constant = how == "sequence_mean_token_sum_norm"
    if needs_constant and not (constant is not None and constant > 0):
        raise ValueError(f"aggregation {how!r} needs a constant above 0, got {constant}")
    if not needs_constant and constant is not None:
        raise ValueError(f"aggregation {how!r} uses no constant, got {constant}")


def filled(mask: Bool[Array, "B T"], *arrays: Float[Array, "B T"]) -> tuple[Array, ...]:
    """Each array in float32 with its padding set to 0, ready for the functions above."""
    return tuple(fill_padding(x, mask).astype(jnp.float32) for x in arrays)
