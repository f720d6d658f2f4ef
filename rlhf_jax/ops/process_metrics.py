"""How good step scores are: the first wrong step, and every step for itself.

On the host, in float64. A solution has one score and one label for each step: 1 right, 0 wrong,
NaN not labelled. "No wrong step" is -1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from rlhf_jax.ops.step_labels import check_how
from rlhf_jax.types import Array

NO_ERROR = -1


class FirstError(NamedTuple):
    """ProcessBench's numbers; NaN where the set has no solution of the kind."""

    error_accuracy: float  # solutions with an error whose first wrong step is found exactly
    correct_accuracy: float  # solutions without one of which that is said
    f1: float  # harmonic mean of the two


class StepAccuracy(NamedTuple):
    """PRMBench's numbers over labelled steps; NaN where nothing is of the kind."""

    accuracy: float
    f1: float  # of "right"
    negative_f1: float  # of "wrong"
    prm_score: float  # half of each


def first_wrong(scores: Float[Array, " S"], *, threshold: float = 0.0) -> int:
    """The first step whose score is not above the threshold; -1 if all are.

    The threshold 0 is P(right) = ½ for logits.
    """
    wrong = np.flatnonzero(~(np.asarray(scores, np.float64) > threshold))
    return int(wrong[0]) if len(wrong) else NO_ERROR


def first_error(found: Int[np.ndarray, " N"], wanted: Int[np.ndarray, " N"]) -> FirstError:
    """How often the first wrong step is told exactly, for solutions with and without one.

    F1 = 2ab/(a + b) of the accuracy a on solutions with an error and b on those without. Zheng et
    al. 2024, "ProcessBench", https://arxiv.org/abs/2412.06559, section 3.
    """
    found, wanted = np.asarray(found), np.asarray(wanted)
    flawed = wanted != NO_ERROR
    hits = found == wanted
    a = float(hits[flawed].mean()) if flawed.any() else math.nan
    b = float(hits[~flawed].mean()) if not flawed.all() else math.nan
    return FirstError(a, b, _harmonic(a, b))


def first_error_interval(
    found: Int[np.ndarray, " N"],
    wanted: Int[np.ndarray, " N"],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of F1 from those of its two accuracies, which are independent.

    Of each accuracy, k of n, draws come from Beta(k + ½, n − k + ½), its posterior under Jeffreys'
    prior, so the interval is not empty where all or none are told right; it is widened to hold the
    F1 itself. Solutions of one problem count as independent.
    """
    told, flawed = first_error(found, wanted), np.asarray(wanted) != NO_ERROR
    rng = np.random.default_rng(seed)
    many = int(flawed.sum())
    if not 0 < many < len(flawed):
        return math.nan, math.nan

    def drawn(share, total):
        right = share * total
        return rng.beta(right + 0.5, total - right + 0.5, resamples)

    a = drawn(told.error_accuracy, many)
    b = drawn(told.correct_accuracy, len(flawed) - many)
    low, high = np.quantile(2 * a * b / (a + b), (0.025, 0.975))
    return min(float(low), told.f1), max(float(high), told.f1)


def blind_f1(wanted: Int[np.ndarray, " N"]) -> float:
    """The F1 of the best guess that looks at no solution.

    It says "no error" with probability q, else the commonest wrong step, which m of the solutions
    with an error have: F1 = 2(1−q)mq / ((1−q)m + q), at most 2m/(1 + √m)².
    """
    steps = np.asarray(wanted)[np.asarray(wanted) != NO_ERROR]
    if not len(steps) or len(steps) == len(wanted):
        return math.nan
    share = float(np.bincount(steps).max() / len(steps))
    return 2 * share / (1 + math.sqrt(share)) ** 2


def aggregate_logit(steps: Sequence[float], *, how: str) -> float:
    """One score of a text as a logit, from the logits of its steps; 0 where it has none.

    `ops.step_labels.aggregate` in float64, and of min, product, mean and last the logit: where
    float32 rounds a probability to 1, solutions still differ. `sum` is log-odds as it is.
    """
    check_how(how)
    logits = np.asarray(steps or [0.0], np.float64)
    if how == "min":
        return float(logits.min())
    if how in ("last", "sum"):
        return float(logits[-1] if how == "last" else logits.sum())
    right, wrong = -np.logaddexp(0.0, -logits), -np.logaddexp(0.0, logits)  # log σ(r), log σ(−r)
    if how == "mean":  # both shares from logarithms: 1 − p has no digits left where p is 1
        return float(np.logaddexp.reduce(right) - np.logaddexp.reduce(wrong))
    before = np.cumsum(right) - right  # 1 − Π p = Σ_s (1 − p_s) Π_{t<s} p_t
    return float(right.sum() - np.logaddexp.reduce(wrong + before))


def best_threshold(
    scores: Sequence[Float[Array, " _"]], wanted: Int[np.ndarray, " N"]
) -> tuple[float, float]:
    """The threshold that gives the highest F1, and that F1.

    ProcessBench chooses it on its GSM8K part and uses it on all others. Only scores matter as
    thresholds; of equals the one nearest to 0 is taken.

    Raises:
        ValueError: all solutions have an error, or none.
    """
    wanted = np.asarray(wanted)
    if (wanted == NO_ERROR).all() or (wanted != NO_ERROR).all():
        raise ValueError("a threshold needs solutions with an error and without; one kind is here")
    # What is said changes only where the threshold reaches the lowest score so far of a solution.
    lowest = [np.minimum.accumulate(np.asarray(s, np.float64)) for s in scores]
    tried = np.unique(np.concatenate([[0.0], *lowest]))
    hits = {True: np.zeros(len(tried)), False: np.zeros(len(tried))}
    for low, label in zip(lowest, wanted, strict=True):
        # The first wrong step is `label` for thresholds from its running least to below the one
        # before it; no step is wrong below the least of all.
        start = low[label] if label != NO_ERROR else -math.inf
        stop = low[label - 1] if label > 0 else (math.inf if label == 0 else low[-1])
        hits[label == NO_ERROR] += (tried >= start) & (tried < stop)
    a = hits[False] / (wanted != NO_ERROR).sum()
    b = hits[True] / (wanted == NO_ERROR).sum()
    f1 = 2 * a * b / np.where(a + b > 0, a + b, 1.0)
    best = np.flatnonzero(f1 == f1.max())
    place = best[np.argmin(np.abs(tried[best]))]
    return float(tried[place]), float(f1[place])


def step_accuracy(claimed: Bool[np.ndarray, " M"], right: Shaped[Array, " M"]) -> StepAccuracy:
    """Accuracy, F1 of right and of wrong steps, and their mean.

    Song et al. 2025, "PRMBench", https://arxiv.org/abs/2501.03124, section 4.1: PRMScore is
    ½ F1 + ½ negative F1, over all steps of a set.
    """
    claimed, right = np.asarray(claimed, bool), np.asarray(right, np.float64) > 0.5
    if not len(right):
        return StepAccuracy(*[math.nan] * 4)
    f1, negative = _f1(claimed, right), _f1(~claimed, ~right)
    return StepAccuracy(float((claimed == right).mean()), f1, negative, 0.5 * f1 + 0.5 * negative)


def _f1(claimed, right) -> float:
    """2 true positives / (claimed + there); NaN where both are none."""
    both = int(claimed.sum() + right.sum())
    return 2 * int((claimed & right).sum()) / both if both else math.nan


def _harmonic(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return math.nan
    return 2 * a * b / (a + b) if a + b else 0.0
