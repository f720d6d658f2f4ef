"""How good scores are: ranking, classification, calibration, choice among samples.

On the host, in float64: these read a whole evaluation set, not a batch. The exception is
`pair_correct`, which a compiled evaluation step sums up batch by batch.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import stats

from rlhf_jax.types import Array


def pair_correct(chosen: Float[Array, "*M"], rejected: Float[Array, "*M"]) -> Float[Array, "*M"]:
    """1 where the chosen one scores higher, ½ where the two tie, else 0 (NaN: 0)."""
    return jnp.where(chosen > rejected, 1.0, jnp.where(chosen == rejected, 0.5, 0.0))


def pair_accuracy(chosen: Float[Array, " M"], rejected: Float[Array, " M"]) -> float:
    """The share of pairs in the right order; a tie is half a pair, so constants score ½."""
    chosen, rejected = _floats(chosen), _floats(rejected)
    return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def pair_shares(
    chosen: Float[Array, " M"], rejected: Float[Array, " M"]
) -> tuple[float, float, float]:
    """The shares of pairs in the right order, tied, and in the wrong order; they add up to 1.

    Right + tied / 2 is `pair_accuracy`; right alone counts a tie as a fault.
    """
    chosen, rejected = _floats(chosen), _floats(rejected)
    right, wrong = float(np.mean(chosen > rejected)), float(np.mean(chosen < rejected))
    return right, float(np.mean(chosen == rejected)), wrong


def tie_accuracy(
    margins: Float[Array, " M"], outcomes: Shaped[Array, " M"], *, threshold: float
) -> float:
    """The share of pairs whose outcome is told right where people may say "tie" as well.

    acc_eq of Deutsch, Foster and Freitag 2023, https://arxiv.org/abs/2305.14324, section 3.

    Args:
        margins: score of the first less that of the second.
        outcomes: 1 first, -1 second, 0 a tie.
        threshold: |margin| up to it, itself included, says "tie".
    """
    margins = _floats(margins)
    said = np.sign(margins) * (np.abs(margins) > threshold)
    return float(np.mean(said == _floats(outcomes)))


def best_tie_threshold(
    margins: Float[Array, " M"], outcomes: Shaped[Array, " M"]
) -> tuple[float, float]:
    """The threshold of `tie_accuracy` that gives the most, and what it gives.

    Thresholds that matter are 0 and every |margin|; of equals the smallest is taken. It is chosen
    on the pairs that it is judged by, as in Deutsch et al. 2023, so it is an upper bound.
    """
    margins, outcomes = _floats(margins), _floats(outcomes)
    size = np.abs(margins)
    order = np.argsort(size, kind="stable")
    # From "only equal scores tie" on: each |margin| that turns into a tie gains or loses a pair.
    told = np.sign(margins) == outcomes
    change = ((outcomes == 0).astype(int) - told)[order]
    counts = told.sum() + np.cumsum(change)
    last = np.append(size[order][1:] != size[order][:-1], True)  # equal sizes turn together
    thresholds = np.concatenate([[0.0], size[order][last]])
    found = np.concatenate([[told.sum()], counts[last]])
    best = int(np.argmax(found))
    return float(thresholds[best]), float(found[best] / len(margins))


def cohen_kappa(first: Shaped[Array, " M"], second: Shaped[Array, " M"]) -> float:
    """(p_o − p_e) / (1 − p_e): how much oftener two people agree than by chance; 1 = always.

    p_o is the share of items on which they say the same, p_e what it would be if both said what
    they say independently: Σ_k p_k q_k over labels. Cohen 1960,
    https://doi.org/10.1177/001316446002000104. NaN if both say one thing only, the same.
    """
    a, b = np.asarray(first), np.asarray(second)
    by_chance = float(sum(np.mean(a == label) * np.mean(b == label) for label in np.unique(a)))
    if by_chance == 1:
        return math.nan
    return (float(np.mean(a == b)) - by_chance) / (1 - by_chance)


def auc(scores: Float[Array, " M"], labels: Shaped[Array, " M"]) -> float:
    """Area under the ROC curve: P(a positive scores above a negative) + ½ P(they tie).

    From ranks, Mann and Whitney 1947; NaN if there is no positive or no negative.

    Raises:
        ValueError: a score is NaN, which no order has.
    """
    scores, positive = _ordered(scores), _positive(labels)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return math.nan
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # tied scores share their mean rank
    wins = rank[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))


def prompt_aucs(
    scores: Sequence[Float[Array, " _"]], labels: Sequence[Shaped[Array, " _"]]
) -> Float[np.ndarray, " N"]:
    """`auc` among the samples of each prompt; NaN where all of them are right, or wrong.

    The mean over prompts is the ROC AUC of PPE (Frick et al. 2024,
    https://arxiv.org/abs/2410.14872): how well samples of one prompt are told apart, which says
    nothing of scores of different prompts.
    """
    return np.array([auc(s, z) for s, z in zip(scores, labels, strict=True)], np.float64)


def within_pass_rates(
    correct: Sequence[Shaped[Array, " _"]], *, low: float = 0.1, high: float = 0.9
) -> Bool[np.ndarray, " N"]:
    """Which prompts have a share of right samples from `low` to `high`, both included.

    PPE drops prompts that nearly always or nearly never come out right (Frick et al. 2024,
    https://arxiv.org/abs/2410.14872, section 4). Compared as counts, so that 1 of 10 is 0.1.
    """
    right = [(int(_positive(z).sum()), len(z)) for z in correct]
    edge = 1e-9  # shares of a few samples are far wider apart
    return np.array([low * k - edge <= r <= high * k + edge for r, k in right], bool)


def balanced_accuracy(
    scores: Float[Array, " M"], labels: Shaped[Array, " M"], *, threshold: float = 0.0
) -> float:
    """½ (true-positive rate + true-negative rate), "score > threshold" meaning positive.

    The threshold 0 is P = ½ for logits. NaN if there is no positive or no negative.
    """
    claimed, positive = _floats(scores) > threshold, _positive(labels)
    if positive.all() or not positive.any():
        return math.nan
    return float(0.5 * (claimed[positive].mean() + (~claimed[~positive]).mean()))


def brier(probabilities: Float[Array, " M"], labels: Shaped[Array, " M"]) -> float:
    """mean((p − z)²), z in [0, 1]. Brier 1950; 0 is perfect, a constant ½ gives ¼ on 0/1."""
    return float(np.mean(np.square(_floats(probabilities) - _floats(labels))))


def best_of_k(
    scores: Float[Array, "N K"], gold: Float[Array, "N K"], sizes: Sequence[int]
) -> Float[np.ndarray, " J"]:
    """Expected gold of the best-scored among k of the K samples, for each k in `sizes`.

    With the samples sorted by score, the i-th of K is the best of k random ones (without
    replacement) with probability C(i−1, k−1) / C(K, k): the unbiased estimate, where taking the
    first k samples of each row is merely one draw. Ties are broken at random, in expectation.
    With gold in {0, 1} and scores = gold this is pass@k (Chen et al. 2021,
    https://arxiv.org/abs/2107.03374, equation 1).

    Raises:
        ValueError: a size outside 1..K; a score is NaN, which no order has.
    """
    scores, gold = _ordered(scores), _floats(gold)
    samples = scores.shape[1]
    for size in sizes:
        if not 1 <= size <= samples:
            raise ValueError(f"size {size} of best_of_k; wanted 1 to {samples}, the samples")
    ordered = np.stack([_by_score(s, g) for s, g in zip(scores, gold, strict=True)])
    return (_best_weights(samples, tuple(sizes)) @ ordered.T).mean(axis=1)


def best_of_k_curves(
    scores: Sequence[Float[Array, " _"]], gold: Sequence[Float[Array, " _"]], sizes: Sequence[int]
) -> Float[np.ndarray, "N J"]:
    """`best_of_k` of each prompt alone; prompts may have different numbers of samples."""
    pairs = zip(scores, gold, strict=True)
    return np.stack([best_of_k(_floats(s)[None], _floats(g)[None], sizes) for s, g in pairs])


@functools.cache
def _best_weights(samples: int, sizes: tuple[int, ...]) -> Float[np.ndarray, "J K"]:
    """P(the i-th lowest of K is the best of k drawn), for each k."""
    return np.array(
        [
            [math.comb(i, size - 1) / math.comb(samples, size) for i in range(samples)]
            for size in sizes
        ]
    )


def wilson_interval(
    successes: float | int, total: float | int, *, deviations: float = 1.959964
) -> tuple[float, float]:
    """Wilson's interval for a proportion; the default is 95 %. (0, 1) if total is 0.

    (p + z²/2n ± z sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n). Wilson 1927. Unlike p ± z·se it stays
    in [0, 1] and does not shrink to nothing at p = 0 or 1.
    """
    if total == 0:
        return 0.0, 1.0
    share, square = successes / total, deviations**2
    centre = share + square / (2 * total)
    reach = deviations * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    scale = 1 + square / total
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def clustered_interval(
    values: Float[Array, " M"], groups: Shaped[np.ndarray, " M"], *, deviations: float = 1.959964
) -> tuple[float, float]:
    """Wilson's interval for a mean of values in [0, 1] that depend on each other within groups.

    The variance of the mean between groups, C/(C−1) Σ_g (Σ_{i in g} (v_i − p))² / M², says how
    many independent values the M are worth: n = p(1−p) / variance (Korn and Graubard 1998,
    https://www150.statcan.gc.ca/n1/pub/12-001-x/1998002/article/4356-eng.pdf), at most M. With
    each value a group of its own, n is M but for C/(C−1). Where nothing varies, n is the number C
    of groups.
    """
    values = _floats(values)
    total = len(values)
    if not total:
        return 0.0, 1.0
    mean = float(values.mean())
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    clusters = int(place.max()) + 1
    worth = float(clusters)
    if 0 < mean < 1 and clusters > 1:
        between = np.bincount(place, weights=values - mean)
        variance = clusters / (clusters - 1) * float(np.square(between).sum()) / total**2
        worth = min(float(total), mean * (1 - mean) / variance) if variance else worth
    return wilson_interval(mean * worth, worth, deviations=deviations)


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    scores: Sequence[Shaped[np.ndarray, " _"]],
    labels: Sequence[Shaped[np.ndarray, " _"]],
    *,
    resamples: int = 300,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of ``statistic(scores, labels)`` by the percentile bootstrap over texts.

    Efron 1979, https://doi.org/10.1214/aos/1176344552. Whole texts are drawn, because the steps
    of one text depend on each other. Draws of which the statistic is NaN (an AUC where all texts
    that were drawn are of one class) are left out; where they are most, so is the interval.

    Args:
        scores, labels: one array for each text, with a number for each of its S steps.
        resamples: how often texts are drawn anew, with replacement.
        seed: the same numbers give the same interval.
    """

    def drawn(index):
        return statistic(
            np.concatenate([scores[i] for i in index]), np.concatenate([labels[i] for i in index])
        )

    many = len(scores)
    draws = np.random.default_rng(seed).integers(0, many, (resamples, many))
    found = np.array([drawn(index) for index in draws])
    found = found[~np.isnan(found)]
    if 2 * len(found) < resamples:
        return math.nan, math.nan
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def mean_interval(values: Float[Array, " M"], *, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of independent values: mean ± t s/√M, t being Student's with M − 1.

    s² divides by M − 1. Values that depend on each other, such as the samples of one prompt, are
    averaged first. For values in [0, 1], `clustered_interval` stays within and is not empty where
    all are the same.

    Raises:
        ValueError: fewer than two values.
    """
    found = _floats(values)
    if len(found) < 2:
        raise ValueError(f"{len(found)} values have no interval; wanted 2 or more")
    mean = float(found.mean())
    t = float(stats.t.ppf(0.5 + level / 2, len(found) - 1))
    reach = t * float(found.std(ddof=1)) / math.sqrt(len(found))
    return mean, mean - reach, mean + reach


def prompt_interval(
    values: Float[Array, " N"], *, share: bool, groups: Shaped[np.ndarray, " N"] | None = None
) -> tuple[float, float, float]:
    """(mean, low, high), 95 %, of one value for each of N prompts.

    Args:
        share: the values lie in [0, 1], and so do low and high (`clustered_interval`); else see
            `mean_interval`.
        groups: values of one group depend on each other; None: each is a group of its own.
    """
    found = _floats(values)
    place = np.arange(len(found)) if groups is None else np.asarray(groups)
    if share:
        return float(found.mean()), *clustered_interval(found, place)
    _, place = np.unique(place, return_inverse=True)
    mean, low, high = mean_interval(np.bincount(place, weights=found) / np.bincount(place))
    return mean, low, high


def _by_score(scores, gold):
    """Gold in order of rising score; samples of equal score share their mean gold."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    shared = np.bincount(place, weights=gold) / count
    return shared[np.sort(place)]


def _ordered(scores):
    """Scores as float64, of which each two can be compared."""
    found = _floats(scores)
    if np.isnan(found).any():
        raise ValueError(f"{int(np.isnan(found).sum())} of {found.size} scores are NaN")
    return found


def _positive(labels):
    return _floats(labels) > 0.5


def _floats(x):
    return np.asarray(x, dtype=np.float64)
