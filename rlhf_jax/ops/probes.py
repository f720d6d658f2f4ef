"""What moves a reward besides quality, as numbers with 95 % intervals.

On the host, in float64. A probe compares scores of texts that are equally good and differ in one
thing, such as their length. Scores of one prompt depend on each other, so intervals are over
prompts. The list of probes is that of Lambert, Gilbert and Zick 2023, "The History and Risks of
Reinforcement Learning and Human Feedback", https://arxiv.org/abs/2310.13595; the estimators are
textbook ones.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from rlhf_jax.ops.reward_metrics import clustered_interval, mean_interval
from rlhf_jax.types import Array


class Effect(NamedTuple):
    """A number, its 95 % interval, and how many prompts stand behind it."""

    value: float
    low: float
    high: float
    prompts: int


class Offset(NamedTuple):
    """How much of the spread of scores lies between prompts, where no comparison looks."""

    share: Effect
    between: float  # variance of prompts' means, without what the spread within them adds
    within: float  # variance of scores of one prompt


def mean_effect(differences: Float[Array, " M"], groups: Shaped[np.ndarray, " M"]) -> Effect:
    """The mean over prompts of a prompt's mean difference: changed text less original.

    The interval is that of `mean_interval` over the C prompts' means.

    Raises:
        ValueError: fewer than two prompts.
    """
    means = _by_group(_floats(differences), _place(groups))
    if len(means) < 2:
        raise ValueError(f"{len(means)} prompts have no interval; wanted 2 or more")
    return Effect(*mean_interval(means), len(means))


def within_slope(
    scores: Float[Array, " M"], lengths: Shaped[Array, " M"], groups: Shaped[np.ndarray, " M"]
) -> Effect:
    """d reward / d token among the texts of a group, which are equally good.

    b = Σ_g Σ_i (l_i − l̄_g)(r_i − r̄_g) / Σ_g Σ_i (l_i − l̄_g)²: least squares with a constant for
    each group (a text with its longer and shorter forms), so what groups differ in, quality too,
    falls out. The interval allows for errors that hang together within a group (Liang and Zeger
    1986, https://doi.org/10.1093/biomet/73.1.13): var b = C/(C−1) Σ_g (Σ_i x_i e_i)² / (Σ x²)²,
    and Student's t with C − 1.

    Raises:
        ValueError: fewer than two groups, or no group whose lengths differ.
    """
    place = _place(groups)
    x, y = (_floats(values) for values in (lengths, scores))
    return _slope(x - _by_group(x, place)[place], y - _by_group(y, place)[place], place)


def pair_slope(
    differences: Float[Array, " M"], lengths: Shaped[Array, " M"], groups: Shaped[np.ndarray, " M"]
) -> Effect:
    """d reward / d token at equal quality, from pairs as they are.

    Least squares Δr = a + b Δl over pairs (better less worse side): the constant takes what the
    better side has on average, b what a token adds. Unlike `within_slope` it changes no text, and
    unlike it b keeps what quality and length share beyond that constant.

    Args:
        differences, lengths: of scores and of tokens, better side less worse.
        groups: pairs of one prompt have one number.

    Raises:
        ValueError: fewer than two prompts, or all differences of length are equal.
    """
    x, y = (_floats(values) for values in (lengths, differences))
    return _slope(x - x.mean(), y - y.mean(), _place(groups))


def kept_preference(
    before: Float[Array, " M"], after: Float[Array, " M"], groups: Shaped[np.ndarray, " M"]
) -> Effect:
    """The share of pairs whose better side by score stays the better one after a neutral change.

    A tie after the change is half; pairs that were tied before it say nothing and are left out.
    Wilson's interval over prompts, see `clustered_interval`.

    Args:
        before, after: score differences of the same pairs.

    Raises:
        ValueError: all pairs were tied.
    """
    first, then = _floats(before), _floats(after)
    said = first != 0
    if not said.any():
        raise ValueError("all pairs have equal scores; wanted some with a preference")
    kept = 0.5 + 0.5 * np.sign(first[said]) * np.sign(then[said])
    place = _place(np.asarray(groups)[said])
    low, high = clustered_interval(kept, place)
    return Effect(float(kept.mean()), low, high, int(place.max()) + 1)


def prompt_offset(
    scores: Float[Array, " M"],
    groups: Shaped[np.ndarray, " M"],
    *,
    resamples: int = 300,
    seed: int = 0,
) -> Offset:
    """The share of the variance of scores that is between prompts: σ_b² / (σ_b² + σ_w²).

    Preferences compare answers to one prompt, so they leave every prompt's offset free; a policy
    that is paid scores as they are pays for it in noise. With C prompts of n_g texts each,

        σ_w² = Σ_g Σ_i (r_i − r̄_g)² / (M − C),
        σ_b² = (Σ_g n_g (r̄_g − r̄)² / (C − 1) − σ_w²) / n₀,   n₀ = (M − Σ n_g² / M) / (C − 1),

    the one-way analysis of variance (Searle, Casella and McCulloch 1992, section 3.6). σ_b² has the
    right mean, so it can come out below 0; the share is then 0. Prompts of one text are left out.
    The interval is a bootstrap over prompts.

    Raises:
        ValueError: fewer than two prompts with two texts, or scores that do not vary.
    """
    place, y = _place(groups), _floats(scores)
    counts = np.bincount(place).astype(np.float64)
    means = _by_group(y, place)
    squares = np.bincount(place, weights=np.square(y - means[place]))
    kept = counts > 1
    if kept.sum() < 2:
        raise ValueError(f"{kept.sum()} prompts have two texts; wanted 2 or more")
    table = np.stack([counts, means, squares])[:, kept]
    between, within = _variances(table)
    if not max(between, 0.0) + within:
        raise ValueError("all scores are equal: there is no variance to share")
    many = table.shape[1]
    draws = np.random.default_rng(seed).integers(0, many, (resamples, many))
    shares = [_share(*_variances(table[:, draw])) for draw in draws if len(np.unique(draw)) > 1]
    low, high = np.nanquantile(shares, (0.025, 0.975)) if shares else (math.nan, math.nan)
    share = Effect(_share(between, within), float(low), float(high), many)
    return Offset(share, between, within)


def _variances(table: Float[np.ndarray, "3 C"]) -> tuple[float, float]:
    """σ_b² and σ_w² from the counts, means and sums of squares of prompts."""
    counts, means, squares = table
    total, many = counts.sum(), len(counts)
    within = float(squares.sum() / (total - many))
    spread = float(counts @ np.square(means - counts @ means / total)) / (many - 1)
    size = float(total - np.square(counts).sum() / total) / (many - 1)
    return (spread - within) / size, within


def _share(between: float, within: float) -> float:
    whole = max(between, 0.0) + within
    return max(between, 0.0) / whole if whole else math.nan


def _slope(x: np.ndarray, y: np.ndarray, place: np.ndarray) -> Effect:
    """Least squares through the origin with an interval over groups."""
    clusters, total = int(place.max()) + 1, float(x @ x)
    if clusters < 2:
        raise ValueError(f"{clusters} prompts have no interval; wanted 2 or more")
    if not total:
        raise ValueError("all lengths are equal; wanted some that differ")
    value = float(x @ y) / total
    pull = np.bincount(place, weights=x * (y - value * x))
    deviation = math.sqrt(clusters / (clusters - 1) * float(pull @ pull)) / total
    reach = float(stats.t.ppf(0.975, clusters - 1)) * deviation
    return Effect(value, value - reach, value + reach, clusters)


def _place(groups: np.ndarray) -> np.ndarray:
    """0, 1, ... in place of the groups' names."""
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _by_group(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The mean of each group's values."""
    return np.bincount(place, weights=values) / np.bincount(place)


def _floats(values) -> np.ndarray:
    return np.asarray(values, np.float64)
