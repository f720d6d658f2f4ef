"""The ranking of models that preferences between their answers induce, and how two rankings agree.

On the host, in float64. A battle is a pair of answers by models i and j with an outcome y from 0 to
1: 1 if i wins, ½ for a tie. Frick et al. 2024, "How to Evaluate Reward Models for RLHF",
https://arxiv.org/abs/2410.14872, section 3; separability and agreement after Li et al. 2024,
"Arena-Hard", https://arxiv.org/abs/2406.11939, section 3.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import sparse, special, stats

from rlhf_jax.ops.length_bias import correlation


class Agreement(NamedTuple):
    """How the ranking by one judge, such as a reward model, agrees with that by another."""

    spearman: float
    kendall: float  # tau-b; without ties (concordant − discordant) / C(n, 2)
    row_pearson: float
    separability: float  # of the first judge
    confidence: float  # +1 agree, -1 disagree, 0 where one of the two is not confident
    brier: float  # of P(i above j) by the first against the order of the second


def win_counts(
    first: Int[np.ndarray, " M"],
    second: Int[np.ndarray, " M"],
    outcomes: Float[np.ndarray, " M"],
    *,
    models: int,
) -> Float[np.ndarray, "N N"]:
    """[i, j]: how often i won against j; a tie is half a win for both."""
    wins = np.zeros((models, models))
    np.add.at(wins, (first, second), outcomes)
    np.add.at(wins, (second, first), 1.0 - np.asarray(outcomes, np.float64))
    return wins


def win_shares(wins: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N N"]:
    """[i, j]: the share of the battles with j that i won; NaN where they never met."""
    met = wins + wins.T
    return np.divide(wins, met, out=np.full(wins.shape, np.nan), where=met > 0)


def mean_win_share(wins: Float[np.ndarray, "N N"]) -> Float[np.ndarray, " N"]:
    """Each model's mean over its opponents of the share of battles won; NaN without battles."""
    shares = win_shares(wins)
    count = np.sum(~np.isnan(shares), axis=1)
    total = np.nansum(shares, axis=1)
    return np.divide(total, count, out=np.full(len(wins), np.nan), where=count > 0)


def connected(first: Int[np.ndarray, " M"], second: Int[np.ndarray, " M"], *, models: int) -> bool:
    """Whether battles lead from every model to every other: else they have no common ranking."""
    met = win_counts(first, second, np.full(len(first), 0.5), models=models) > 0
    return sparse.csgraph.connected_components(met)[0] == 1


def bradley_terry_strengths(
    wins: Float[np.ndarray, "N N"], *, prior: float = 0.5
) -> Float[np.ndarray, " N"]:
    """θ with mean 0 that makes Σ_ij w_ij log σ(θ_i − θ_j) greatest.

    Bradley and Terry 1952, by Newton's method on a concave function.

    Args:
        prior: wins added to both sides of every two models that met: a model that always wins has
            no finite strength without. 0 is plain maximum likelihood.

    Raises:
        ValueError: the models fall into parts that never met, or without prior one of them has no
            finite strength.
    """
    wins = np.asarray(wins, np.float64)
    met = wins + wins.T > 0
    parts, _ = sparse.csgraph.connected_components(met)
    if parts > 1:
        raise ValueError(f"the models fall into {parts} parts without a battle between them")
    w = wins + prior * met
    # i beat j, who beat k, ...: round trips between all are what makes strengths finite.
    if sparse.csgraph.connected_components(w > 0, connection="strong")[0] > 1:
        raise ValueError("a model won or lost every battle; set prior above 0")
    theta = np.zeros(len(w))
    for _ in range(100):
        p = special.expit(theta[:, None] - theta)  # P(i beats j)
        slope = (w * (1 - p) - w.T * p).sum(axis=1)
        bend = (w + w.T) * p * (1 - p)
        hessian = np.diag(bend.sum(axis=1)) - bend
        step = np.linalg.solve(hessian + 1.0 / len(w), slope)  # 1/N holds the mean where it is
        theta += step * min(1.0, 2.0 / max(1e-300, float(np.abs(step).max())))  # no wild first step
        if np.abs(step).max() < 1e-13 * max(1.0, np.abs(theta).max()):
            break
    return theta - theta.mean()


def rank_correlations(
    a: Float[np.ndarray, " N"], b: Float[np.ndarray, " N"]
) -> tuple[float, float]:
    """Spearman's ρ and Kendall's τ-b of two lists of strengths; NaN where one does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan, math.nan
    return float(stats.spearmanr(a, b).statistic), float(stats.kendalltau(a, b).statistic)


def row_pearson(a: Float[np.ndarray, "N N"], b: Float[np.ndarray, "N N"]) -> float:
    """The mean over models of Pearson's correlation of their two rows of win shares.

    Opponents that a model never met (NaN) are left out of its row; rows that do not vary are left
    out of the mean, which is NaN if none is left.
    """
    found = []
    for one, other in zip(np.asarray(a), np.asarray(b), strict=True):
        kept = ~(np.isnan(one) | np.isnan(other))
        found.append(correlation(one[kept], other[kept]))
    found = [value for value in found if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan


def bootstrap_strengths(
    first: Int[np.ndarray, " M"],
    second: Int[np.ndarray, " M"],
    outcomes: Float[np.ndarray, " M"],
    *,
    models: int,
    resamples: int = 100,
    seed: int = 0,
    prior: float = 0.5,
) -> Float[np.ndarray, "R N"]:
    """`bradley_terry_strengths` of battles drawn anew with replacement.

    Every two models that met keep the prior, so a draw that misses a pair is no failure. The same
    seed draws the same battles: two judges of one set are compared draw by draw.
    """
    rng = np.random.default_rng(seed)
    count = len(first)
    met = win_counts(first, second, outcomes, models=models)
    least = prior * (met + met.T > 0)
    found = []
    for _ in range(resamples):
        drawn = rng.integers(0, count, count)
        wins = win_counts(first[drawn], second[drawn], outcomes[drawn], models=models)
        found.append(bradley_terry_strengths(wins + least, prior=0.0))
    return np.stack(found)


def intervals(strengths: Float[np.ndarray, "R N"]) -> Float[np.ndarray, "2 N"]:
    """95 % percentile intervals of bootstrapped strengths: low and high of each model."""
    return np.quantile(strengths, (0.025, 0.975), axis=0)


def apart(bounds: Float[np.ndarray, "2 N"]) -> Int[np.ndarray, "N N"]:
    """[i, j]: 1 if all of i's interval lies above j's, -1 if below, 0 if they overlap."""
    low, high = bounds
    above = low[:, None] > high
    return above.astype(int) - above.T


def separability(bounds: Float[np.ndarray, "2 N"]) -> float:
    """The share of pairs of models whose intervals do not overlap."""
    return float(np.mean(apart(bounds)[np.triu_indices(bounds.shape[1], 1)] != 0))


def confidence_agreement(a: Float[np.ndarray, "2 N"], b: Float[np.ndarray, "2 N"]) -> float:
    """Mean over pairs of models: +1 if both judges are confident and agree, -1 if confident and at
    odds, 0 where the intervals of one of them overlap."""
    places = np.triu_indices(a.shape[1], 1)
    return float(np.mean(apart(a)[places] * apart(b)[places]))


def order_brier(strengths: Float[np.ndarray, "R N"], wanted: Float[np.ndarray, " N"]) -> float:
    """Mean over pairs (P(i above j) − 1[wanted_i > wanted_j])², P the share of the R draws.

    Equal strengths count ½ on both sides.
    """

    def above(x):
        return np.where(x[..., :, None] > x[..., None, :], 1.0, 0.0) + 0.5 * (
            x[..., :, None] == x[..., None, :]
        )

    places = np.triu_indices(len(wanted), 1)
    claimed, truth = above(strengths).mean(axis=0), above(np.asarray(wanted, np.float64))
    return float(np.mean(np.square(claimed - truth)[places]))


def agreement(
    first: Int[np.ndarray, " M"],
    second: Int[np.ndarray, " M"],
    judged: Float[np.ndarray, " M"],
    wanted: Shaped[np.ndarray, " M"],
    *,
    models: int,
    resamples: int = 100,
    seed: int = 0,
) -> Agreement:
    """How one judge of battles ranks the models beside another; see `Agreement`.

    Args:
        first, second: the models of each battle, from 0 on.
        judged: outcomes by the judge that is looked at, such as a reward model.
        wanted: outcomes by the other, such as people.

    Raises:
        ValueError: see `bradley_terry_strengths`.
    """
    ours, theirs = (
        win_counts(first, second, np.asarray(y, np.float64), models=models)
        for y in (judged, wanted)
    )
    strengths, truth = bradley_terry_strengths(ours), bradley_terry_strengths(theirs)
    spearman, kendall = rank_correlations(strengths, truth)
    draws, true_draws = (
        bootstrap_strengths(
            first, second, np.asarray(y, np.float64), models=models, resamples=resamples, seed=seed
        )
        for y in (judged, wanted)
    )
    return Agreement(
        spearman=spearman,
        kendall=kendall,
        row_pearson=row_pearson(win_shares(ours), win_shares(theirs)),
        separability=separability(intervals(draws)),
        confidence=confidence_agreement(intervals(draws), intervals(true_draws)),
        brier=order_brier(draws, truth),
    )
