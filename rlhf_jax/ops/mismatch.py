"""Whether a policy still gets better where its reward says so: signs of objective mismatch.

On the host, in float64. A course has one number for each of E evaluations of a run; NaN: not
measured. Lambert and Calandra 2023, "The Alignment Ceiling", https://arxiv.org/abs/2311.00168, ask
for such a watch. Its heart is a split: two reward models of one kind, each trained on its half of
the pairs (Bai et al. 2022, https://arxiv.org/abs/2204.05862, section 4.2). The policy trains
against one, and both are asked; what only the first one sees is no reward. The thresholds are ours.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.ops.length_bias import correlation

ALARMS = ("divergence", "gold", "kl", "length", "refusals", "diverged")


class Course(NamedTuple):
    """What was measured; of the start, one number for each of R completions in place of E."""

    proxy: Float[np.ndarray, " E"]  # score of the reward model that trains
    held_out: Float[np.ndarray, " E"]  # of its twin from the other half of the pairs
    gold: Float[np.ndarray, " E"]  # what both stand for
    kl: Float[np.ndarray, " E"]  # to the reference, nats per completion
    length: Float[np.ndarray, " E"]  # tokens
    refusals: Float[np.ndarray, " E"]  # share of completions


class Thresholds(NamedTuple):
    """When an alarm fires; None: never."""

    divergence: float | int = 0.35  # relative, above which the two reward models are at odds
    in_a_row: int = 5  # evaluations for which they are, and for which reward is below the start
    window: int = 20  # evaluations over which reward and gold are correlated
    kl_max: float | int | None = None  # nats per completion
    kl_target: float | int | None = None  # ten times of it is divergence after SuperHF
    length: float | int = 1.5  # times that of the start
    refusals: float | int = 2.0  # times those of the start


class Link(NamedTuple):
    """A correlation with a 95 % interval; NaN where there is too little to say."""

    value: float
    low: float
    high: float
    count: int  # of points


def zscores(values: Float[np.ndarray, " E"], start: Float[np.ndarray, " R"]) -> np.ndarray:
    """(values − mean of the start) / std of the start; NaN where the start does not vary."""
    start = _floats(start)
    # Compared as they are: after the mean is taken off, rounding looks like variation.
    varies = len(start) > 0 and not np.all(start == start[0])
    std = start.std() if varies else math.nan
    return (_floats(values) - (start.mean() if varies else math.nan)) / std


def relative_divergence(
    trained: Float[np.ndarray, " E"], held_out: Float[np.ndarray, " E"], *, least: float = 0.5
) -> Float[np.ndarray, " E"]:
    """(z_a − z_b) / max(z_a, least): the share of the gain that the twin does not see.

    0: both rise alike; 1: the twin sees nothing. An absolute difference grows with every gain, and
    gave false alarms with good reward models in tests/worlds/mismatch_test.py.

    Args:
        trained: z_a, of the reward model that trains, in deviations of the start (`zscores`).
        held_out: z_b, of the other one.
        least: deviations; a gain smaller than that is not divided by itself.
    """
    a, b = _floats(trained), _floats(held_out)
    return (a - b) / np.maximum(a, least)


def in_a_row(flags: Bool[np.ndarray, " E"]) -> Int[np.ndarray, " E"]:
    """How many flags up to each place, itself included, were raised one after the other."""
    found, count = np.zeros(len(flags), np.int64), 0
    for i, flag in enumerate(flags):
        count = count + 1 if flag else 0
        found[i] = count
    return found


def window_correlations(
    x: Float[np.ndarray, " E"], y: Float[np.ndarray, " E"], *, window: int
) -> Float[np.ndarray, " E"]:
    """`correlation` over the last `window` evaluations; NaN until there are as many."""
    found = np.full(len(x), math.nan)
    for end in range(window, len(x) + 1):
        a, b = x[end - window : end], y[end - window : end]
        if not (np.isnan(a).any() or np.isnan(b).any()):
            found[end - 1] = correlation(a, b)
    return found


def diverged(
    reward: Float[np.ndarray, " E"],
    start: float,
    kl: Float[np.ndarray, " E"],
    kl_target: float | int | None,
) -> Bool[np.ndarray, " E"]:
    """Reward below the start, or KL above ten times its target (None: reward alone).

    Mukobi et al. 2023, "SuperHF", https://arxiv.org/abs/2310.16763, whose runs are counted by it.
    """
    far = _floats(kl) > 10 * (math.inf if kl_target is None else kl_target)
    return (_floats(reward) < start) | far


def alarms(
    course: Course, start: Course, thresholds: Thresholds
) -> dict[str, Bool[np.ndarray, " E"]]:
    """Which of `ALARMS` fire at each evaluation; what was not measured fires none.

        divergence   relative divergence > 0.35, five evaluations in a row
        gold         correlation of reward and gold over 20 evaluations < 0
        kl           KL > kl_max
        length       mean length > 1.5 · that of the start
        refusals     share of refusals > 2 · that of the start
        diverged     `diverged`: by KL at once, by reward five evaluations in a row, since noise
                     alone has a policy that has yet to learn below its start half of the time

    An alarm asks for somebody to look. It is no rule to stop by: in the world of
    tests/worlds/mismatch_test.py gold mostly goes on rising after the first one.
    """
    t, now, then = thresholds, Course(*map(_floats, course)), Course(*map(_floats, start))
    a, b = zscores(now.proxy, then.proxy), zscores(now.held_out, then.held_out)
    at_odds = relative_divergence(a, b) > t.divergence
    reward, first = now.proxy, float(then.proxy.mean())
    below = diverged(reward, first, np.zeros_like(reward), None)
    far = diverged(np.full_like(reward, first), first, now.kl, t.kl_target)
    return {
        "divergence": in_a_row(at_odds) >= t.in_a_row,
        "gold": window_correlations(reward, now.gold, window=t.window) < 0,
        "kl": now.kl > (math.inf if t.kl_max is None else t.kl_max),
        "length": now.length > t.length * then.length.mean(),
        "refusals": now.refusals > t.refusals * then.refusals.mean(),
        "diverged": (in_a_row(below) >= t.in_a_row) | far,
    }


def within_prompt_accuracy(
    scores: Float[np.ndarray, "N K"], truth: Float[np.ndarray, "N K"]
) -> float:
    """The share of pairs of samples of one prompt that scores order as the truth does.

    Pairs that are equal in truth are left out, equal scores are half right; NaN: no pair is left.
    """
    first, second = np.triu_indices(scores.shape[1], 1)
    s = np.sign(_floats(scores)[:, first] - scores[:, second])
    t = np.sign(_floats(truth)[:, first] - truth[:, second])
    told = t != 0
    return float(np.mean((1 + s[told] * t[told]) / 2)) if told.any() else math.nan


def correlation_interval(
    x: Float[np.ndarray, " E"],
    y: Float[np.ndarray, " E"],
    *,
    block: int = 0,
    resamples: int = 1000,
    seed: int = 0,
) -> Link:
    """Pearson's correlation with the 95 % interval of a bootstrap over blocks of evaluations.

    Evaluations that follow each other are alike, so blocks that are neighbours are drawn, around
    the end to the beginning (Politis and Romano 1992, circular blocks); block 1 is Efron's
    bootstrap, for points that have no order, such as runs. Points with a NaN are left out. So are
    draws that do not vary, and where they are most, or points fewer than 8, so is the interval.

    Args:
        block: points in a block; 0: ⌈E^(1/3)⌉, the order that Hall, Horowitz and Jing 1995 give.
    """
    a, b = _floats(x), _floats(y)
    kept = ~(np.isnan(a) | np.isnan(b))
    a, b = a[kept], b[kept]
    count, value = len(a), correlation(a, b)
    if count < 8 or math.isnan(value):
        return Link(value, math.nan, math.nan, count)
    size = block or math.ceil(count ** (1 / 3))
    starts = np.random.default_rng(seed).integers(0, count, (resamples, math.ceil(count / size)))
    draws = (starts[:, :, None] + np.arange(size)).reshape(resamples, -1)[:, :count] % count
    found = np.array([correlation(a[draw], b[draw]) for draw in draws])
    found = found[~np.isnan(found)]
    if 2 * len(found) < resamples:
        return Link(value, math.nan, math.nan, count)
    low, high = np.quantile(found, (0.025, 0.975))
    return Link(value, float(low), float(high), count)


def links(
    accuracy: Float[np.ndarray, " E"],
    reward: Float[np.ndarray, " E"],
    gold: Float[np.ndarray, " E"],
    *,
    block: int = 0,
    seed: int = 0,
) -> Mapping[str, Link]:
    """The three links of Lambert and Calandra, each as a correlation over the same points.

    Args:
        accuracy: how well the reward model orders completions it was not trained on.
        reward: what the policy gets from it.
        gold: what the policy is worth.
        block: see `correlation_interval`; 1 where the points are runs.
    """
    pairs = {
        "reward model -> policy reward": (accuracy, reward),
        "policy reward -> gold": (reward, gold),
        "reward model -> gold": (accuracy, gold),
    }
    return {
        name: correlation_interval(*pair, block=block, seed=seed) for name, pair in pairs.items()
    }


def _floats(x) -> np.ndarray:
    return np.asarray(x, np.float64)
