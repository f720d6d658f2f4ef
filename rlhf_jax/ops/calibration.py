"""Whether probabilities mean what they say, and the one number that mends them.

On the host, in float64. A pair's margin d = r(chosen) − r(rejected) claims P = σ(d). Which half
stands first is arbitrary, so what is judged is the claim "the higher score is better" with
confidence σ(|d|) and the label 1, 0, or ½ for a tie; see `pair_claims`.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import optimize, special

from rlhf_jax.ops.reward_metrics import brier
from rlhf_jax.types import Array

# Temperatures are looked for from e^-9 to e^9.
_REACH = 9.0


class Calibration(NamedTuple):
    """Before and after temperature scaling; the numbers after it are of held-out halves."""

    brier: float
    ece: float
    log_loss: float  # nats per claim
    temperature: float
    brier_scaled: float
    ece_scaled: float
    log_loss_scaled: float


def pair_claims(
    chosen: Float[Array, " M"], rejected: Float[Array, " M"]
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Logits |d| and labels (1 right, 0 wrong, ½ tied) of "the higher score is better"."""
    margin = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    return np.abs(margin), 0.5 + 0.5 * np.sign(margin)


def expected_calibration_error(
    probabilities: Float[Array, " M"],
    labels: Shaped[Array, " M"],
    *,
    bins: int = 15,
    least: float = 0.0,
) -> float:
    """Σ_b n_b/M · |mean label − mean probability| over bins of equal width from `least` to 1.

    Naeini et al. 2015, https://ojs.aaai.org/index.php/AAAI/article/view/9602; 15 bins as in Guo et
    al. 2017, https://arxiv.org/abs/1706.04599, equation 3. A border belongs to the bin above it.

    Args:
        least: the smallest probability that can be: ½ for the confidences of pairs.

    Raises:
        ValueError: no claims, or a probability outside `least` to 1.
    """
    p, z = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    if not len(p) or p.min() < least or p.max() > 1:
        found = f"{p.min()} to {p.max()}" if len(p) else "none"
        raise ValueError(f"probabilities {found}; wanted some from {least} to 1")
    place = np.minimum((bins * (p - least) / (1 - least)).astype(int), bins - 1)
    gap = np.bincount(place, weights=z - p, minlength=bins)
    return float(np.abs(gap).sum() / len(p))


def log_loss(logits: Float[Array, " M"], labels: Shaped[Array, " M"]) -> float:
    """mean(−z log σ(x) − (1−z) log σ(−x)) = mean(log(1 + e^x) − z x), in nats per claim."""
    x, z = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    return float(np.mean(np.logaddexp(0.0, x) - z * x))


def fit_temperature(logits: Float[Array, " M"], labels: Shaped[Array, " M"]) -> float:
    """The T > 0 that makes `log_loss` of logits / T least.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 4.2. The loss is convex in 1/T, so it
    has one valley in log T. Where claims are never wrong T falls until the loss is 0, where they
    are no better than chance it rises to e^9: no temperature is best then.
    """
    x = np.asarray(logits, np.float64)
    found = optimize.minimize_scalar(
        lambda place: log_loss(x * math.exp(-place), labels),
        bounds=(-_REACH, _REACH),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return math.exp(found.x)


def scale_held_out(
    logits: Float[Array, " M"], labels: Shaped[Array, " M"], fold: Int[np.ndarray, " M"]
) -> Float[np.ndarray, " M"]:
    """Logits over the temperature that the claims of the other fold were fitted with.

    Args:
        fold: 0 or 1 for each claim; claims of one prompt belong in one fold.

    Raises:
        ValueError: a fold without claims.
    """
    x, z, fold = np.asarray(logits, np.float64), np.asarray(labels, np.float64), np.asarray(fold)
    if not (fold == 0).any() or not (fold == 1).any():
        raise ValueError("one of the two folds is empty; wanted claims of two prompts or more")
    first, second = (fit_temperature(x[fold == f], z[fold == f]) for f in (1, 0))
    return x / np.where(fold == 0, first, second)


def calibration(
    logits: Float[Array, " M"],
    labels: Shaped[Array, " M"],
    fold: Int[np.ndarray, " M"],
    *,
    bins: int = 15,
    least: float = 0.0,
) -> Calibration:
    """Brier score, calibration error and log loss, before and after `scale_held_out`.

    Where one of the folds is empty, there are no numbers after it: they are NaN.

    Args:
        bins, least: see `expected_calibration_error`.
    """

    def judged(x) -> tuple[float, float, float]:
        p = special.expit(np.asarray(x, np.float64))
        error = expected_calibration_error(p, labels, bins=bins, least=least)
        return brier(p, labels), error, log_loss(x, labels)

    before, temperature = judged(logits), fit_temperature(logits, labels)
    if len(np.unique(fold)) < 2:
        return Calibration(*before, temperature, math.nan, math.nan, math.nan)
    return Calibration(*before, temperature, *judged(scale_held_out(logits, labels, fold)))
