"""The objectives of PPO and its descendants as one loss of values, and how tokens are averaged.

`Surrogate` holds the values; `policy_loss` is the loss per token. Nothing here knows padding
except `aggregate` and `policy_ratio`: callers fill padding (`masking.fill_padding`) before these
functions, so that no NaN enters a derivative.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.divergence import check_estimator
from rlhf_jax.ops.masking import fill_padding, masked_mean, masked_sum, mean_of
from rlhf_jax.types import Array, Mean

AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
)
PLACES = ("loss", "reward")
RATIOS = ("token", "sequence")
FORMS = ("clip", "cispo", "reinforce")
_MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: every clip has long since acted, and float32 is safe


class Surrogate(NamedTuple):
    """The values that policy-gradient methods differ in.

    L = agg(loss per token) + β agg(KL) − c_H agg(H),  or with −β KL in the rewards

    clip_low, clip_high   ε below and above 1 of the ratio ρ
    dual_clip             c: the objective is at least c A where A < 0; None = off
    ratio                 "token": ρ_t = π / π_old;  "sequence": its geometric mean over the tokens
    form                  "clip": −min(ρ A, clip(ρ) A);  "cispo": −sg(min(ρ, 1 + ε_high)) A log π;
                          "reinforce": −A log π, whatever the ratio
    aggregate, constant   as in `aggregate`
    kl_coef               β, per nat of divergence from the reference; 0 = none, needs no reference
    kl_estimator          one of `divergence.ESTIMATORS`
    kl_place              "loss": a term that is differentiated;  "reward": taken off the rewards
    kl_weighted           KL term times ρ: unbiased for tokens of the old policy (DeepSeek-AI 2025,
                          DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 3.1)
    entropy_coef          c_H of the entropy bonus, per nat; 0 = none
    """

    clip_low: float | int = 0.2
    clip_high: float | int = 0.2
    dual_clip: float | int | None = None
    ratio: str = "token"
    form: str = "clip"
    aggregate: str = "token_mean"
    constant: float | int | None = None
    kl_coef: float | int = 0.0
    kl_estimator: str = "k3"
    kl_place: str = "loss"
    kl_weighted: bool = False
    entropy_coef: float | int = 0.0

    @property
    def reward_kl(self) -> float | int:
        """β of the KL that is taken off the rewards."""
        return self.kl_coef if self.kl_place == "reward" else 0.0

    @property
    def loss_kl(self) -> float | int:
        """β of the KL that is a term of the loss."""
        return self.kl_coef if self.kl_place == "loss" else 0.0


def check_surrogate(surrogate: Surrogate) -> None:
    """Raises ValueError for values that no loss can have, naming the value and what would do."""
    check_aggregation(surrogate.aggregate, surrogate.constant)
    check_estimator(surrogate.kl_estimator)
    for name, known in (("ratio", RATIOS), ("form", FORMS), ("kl_place", PLACES)):
        if getattr(surrogate, name) not in known:
            raise ValueError(
                f"unknown {name} {getattr(surrogate, name)!r}; known: {', '.join(known)}"
            )
    if not 0 <= surrogate.clip_low <= 1:
        raise ValueError(
            f"clip_low={surrogate.clip_low}; wanted 0 to 1: a ratio is never below 0, so 1 already "
            "means no clip"
        )
    for name in ("clip_high", "kl_coef", "entropy_coef"):
        if not getattr(surrogate, name) >= 0:
            raise ValueError(f"{name}={getattr(surrogate, name)}; wanted 0 or more")
    if surrogate.kl_weighted and surrogate.kl_place != "loss":
        raise ValueError("kl_weighted=True, but rewards have no ratio; set kl_place='loss'")
    if surrogate.kl_weighted and surrogate.kl_estimator in ("k2", "k3+"):
        raise ValueError(
            f"kl_weighted=True with kl_estimator={surrogate.kl_estimator!r}: times the ratio only "
            "k1 and k3 have the gradient of the KL; set 'k3'"
        )
    limit = 1 + surrogate.clip_high
    if surrogate.dual_clip is not None and not surrogate.dual_clip > limit:
        raise ValueError(
            f"dual_clip={surrogate.dual_clip}; wanted more than 1 + the clip above = {limit}, or "
            "None"
        )
    if surrogate.form != "clip" and surrogate.dual_clip is not None:
        raise ValueError(
            f"dual_clip={surrogate.dual_clip}, but form={surrogate.form!r} has none; leave it out"
        )
    if surrogate.form == "reinforce" and surrogate.ratio != "token":
        raise ValueError(
            f"ratio={surrogate.ratio!r}, but form='reinforce' has no ratio; leave it out"
        )


def policy_ratio(
    logprobs: Float[Array, "*B T"],
    old_logprobs: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    level: str,
) -> Float[Array, "*B T"]:
    """ρ_t = exp(log π − log π_old) at every token, or for the whole sequence.

    sequence: s = exp(mean_t(log π − log π_old)), the same at every token of the mask
    (Zheng et al. 2025, https://arxiv.org/abs/2507.18071, equation 7).
    """
    difference = logprobs.astype(jnp.float32) - old_logprobs.astype(jnp.float32)
    if level == "sequence":
        mean = masked_mean(difference, mask, axis=-1)[..., None]
        difference = jnp.broadcast_to(mean, difference.shape)
    return jnp.exp(jnp.clip(difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def policy_loss(
    logprobs: Float[Array, "*B T"],
    old_logprobs: Float[Array, "*B T"],
    advantages: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    surrogate: Surrogate,
) -> tuple[Float[Array, "*B T"], Bool[Array, "*B T"], Float[Array, "*B T"]]:
    """Returns (loss, clipped, ratio) per token, without KL and entropy; see `Surrogate`.

    "cispo": the clip weighs the token and never silences it (MiniMax 2025,
    https://arxiv.org/abs/2506.13585, equation 4); `clipped` is true where it acts. "reinforce":
    Williams 1992; nothing is clipped.
    """
    ratio = policy_ratio(logprobs, old_logprobs, mask, surrogate.ratio)
    if surrogate.form == "clip":
        loss, clipped = clipped_objective(
            ratio,
            advantages,
            clip_low=surrogate.clip_low,
            clip_high=surrogate.clip_high,
            dual_clip=surrogate.dual_clip,
        )
        return loss, clipped, ratio
    weighted = advantages * logprobs.astype(jnp.float32)
    if surrogate.form == "reinforce":
        return -weighted, jnp.zeros(ratio.shape, bool), ratio
    limit = 1.0 + surrogate.clip_high
    return -jax.lax.stop_gradient(jnp.minimum(ratio, limit)) * weighted, ratio > limit, ratio


def clipped_objective(
    ratio: Float[Array, "*B T"],
    advantages: Float[Array, "*B T"],
    *,
    clip_low: float | int,
    clip_high: float | int,
    dual_clip: float | int | None = None,
) -> tuple[Float[Array, "*B T"], Bool[Array, "*B T"]]:
    """Returns (loss, clipped) per token.

    J = min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A);  loss = −J

    With `dual_clip` = c, J is at least c A where A < 0 (Ye et al. 2020,
    https://arxiv.org/abs/1912.09729, equation 5): a very unlikely token that became likely
    cannot dominate the batch. `clipped` is true where a clip has cut the gradient off.

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7; two clips as in
    Yu et al. 2025, https://arxiv.org/abs/2503.14476, equation 10.
    """
    plain = ratio * advantages
    cut = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = jnp.minimum(plain, cut)
    clipped = cut < plain
    if dual_clip is not None:
        floor = dual_clip * advantages
        floored = (advantages < 0) & (objective < floor)
        objective = jnp.where(floored, floor, objective)
        clipped = clipped | floored
    return -objective, clipped


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
    constant: float | int | None = None,
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


def check_aggregation(how: str, constant: float | int | None) -> None:
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
