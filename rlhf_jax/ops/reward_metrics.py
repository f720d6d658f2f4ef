"""How good scores are: ranking, classification, calibration, choice among samples.

On the host, in float64: these read a whole evaluation set, not a batch. The exception is
`pair_correct`, which a compiled evaluation step sums up batch by batch.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from rlhf_jax.types import Array


def pair_correct(chosen: Float[Array, "*M"], rejected: Float[Array, "*M"]) -> Float[Array, "*M"]:
    """1 where the chosen one scores higher, ½ where the two tie, else 0 (NaN: 0)."""
    return jnp.where(chosen > rejected, 1.0, jnp.where(chosen == rejected, 0.5, 0.0))


def pair_accuracy(chosen: Float[Array, " M"], rejected: Float[Array, " M"]) -> float:
    """The share of pairs in the right order; a tie is half a pair, so constants score ½."""
    chosen, rejected = _floats(chosen), _floats(rejected)
    return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def auc(scores: Float[Array, " M"], labels: Shaped[Array, " M"]) -> float:
    """Area under the ROC curve: P(a positive scores above a negative) + ½ P(they tie).

    From ranks, Mann and Whitney 1947; NaN if there is no positive or no negative.
    """
    scores, positive = _floats(scores), _positive(labels)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return math.nan
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # tied scores share their mean rank
    wins = rank[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))


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
        ValueError: a size outside 1..K.
    """
    scores, gold = _floats(scores), _floats(gold)
    samples = scores.shape[1]
    for size in sizes:
        if not 1 <= size <= samples:
            raise ValueError(f"size {size} of best_of_k; wanted 1 to {samples}, the samples")
    ordered = np.stack([_by_score(s, g) for s, g in zip(scores, gold, strict=True)])
    weights = np.array(
        [
            [math.comb(i, size - 1) / math.comb(samples, size) for i in range(samples)]
            for size in sizes
        ]
    )
    return (weights @ ordered.T).mean(axis=1)


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


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    scores: Sequence[Shaped[np.ndarray, " S"]],
    labels: Sequence[Shaped[np.ndarray, " S"]],
    *,
    resamples: int = 300,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of ``statistic(scores, labels)`` by the percentile bootstrap over texts.

    Efron 1979, https://doi.org/10.1214/aos/1176344552. Whole texts are drawn, because the steps
    of one text depend on each other.

    Args:
        scores, labels: one array for each text, with a number for each of its S steps.
        resamples: how often texts are drawn anew, with replacement.
        seed: the same numbers give the same interval.
    """

    def drawn(index):
        return statistic(
            np.concatenate([scores[i] for i in index]), np.concatenate([labels[i] for i in index])
        )

    found = stats.bootstrap(
        (np.arange(len(scores)),),
        drawn,
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def mean_interval(
    values: Float[Array, " M"], *, deviations: float = 1.959964
) -> tuple[float, float, float]:
    """(mean, low, high) of independent values: mean ± z s/√M; the default is 95 %.

    s² divides by M − 1. Values that depend on each other, such as the samples of one prompt, are
    averaged first.

    Raises:
        ValueError: fewer than two values.
    """
    found = _floats(values)
    if len(found) < 2:
        raise ValueError(f"{len(found)} values have no interval; wanted 2 or more")
    mean = float(found.mean())
    reach = deviations * float(found.std(ddof=1)) / math.sqrt(len(found))
    return mean, mean - reach, mean + reach


def _by_score(scores, gold):
    """Gold in order of rising score; samples of equal score share their mean gold."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    shared = np.bincount(place, weights=gold) / count
    return shared[np.sort(place)]


def _positive(labels):
    return _floats(labels) > 0.5


def _floats(x):
    return np.asarray(x, dtype=np.float64)
