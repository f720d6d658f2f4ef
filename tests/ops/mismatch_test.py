"""Signs of objective mismatch on numbers that are worked out by hand."""

import math

import numpy as np
import pytest

from rlhf_jax.ops.length_bias import correlation
from rlhf_jax.ops.mismatch import (
    ALARMS,
    Course,
    Thresholds,
    alarms,
    correlation_interval,
    diverged,
    in_a_row,
    links,
    relative_divergence,
    window_correlations,
    within_prompt_accuracy,
    zscores,
)

NAN = math.nan


def column(*values):
    return np.array(values, np.float64)


def course(count, **columns):
    """NaN where nothing is given."""
    blank = {name: np.full(count, NAN) for name in Course._fields}
    return Course(**(blank | {name: column(*values) for name, values in columns.items()}))


START = course(
    4, proxy=(1, 1, 3, 3), held_out=(0, 0, 4, 4), gold=(0, 1, 0, 1), kl=(0, 0, 0, 0),
    length=(8, 12, 8, 12), refusals=(0, 0, 0, 1),
)  # fmt: skip


def test_scores_are_in_deviations_of_the_start():
    # Mean 2, population standard deviation 1.
    np.testing.assert_array_equal(zscores(column(2, 3.5, 0), START.proxy), [0, 1.5, -2])
    third = np.full(3, np.float32(0.1))  # of which rounding would make a deviation
    assert np.isnan(zscores(column(1.0), third)).all()


def test_divergence_is_relative_to_the_gain_but_not_to_a_small_one():
    a, b = column(2, 2, 2, 0.1, -1), column(2, 1, -1, 0, -1.2)
    # (a - b) / max(a, 1/2)
    np.testing.assert_allclose(relative_divergence(a, b), [0, 0.5, 1.5, 0.2, 0.4])


def test_flags_in_a_row():
    assert in_a_row(np.array([1, 1, 0, 1, 1, 1], bool)).tolist() == [1, 2, 0, 1, 2, 3]


def test_window_correlations_wait_for_a_whole_window():
    x, y = column(1, 2, 3, 4, 5), column(2, 4, 6, 5, 4)
    found = window_correlations(x, y, window=3)
    assert np.isnan(found[:2]).all()
    np.testing.assert_allclose(found[2:], [1, 0.5, -1])
    assert np.isnan(window_correlations(x, column(1, NAN, 3, 4, 5), window=3)[:4]).all()


def test_diverged_is_below_the_start_or_far_from_it():
    found = diverged(column(1.9, 2, 3, 3), 2.0, column(0, 5, 40, 41), 4)
    assert found.tolist() == [True, False, False, True]
    assert diverged(column(1.9, 3), 2.0, column(0, 1e9), None).tolist() == [True, False]


def fired(now, **thresholds):
    found = alarms(now, START, Thresholds(**thresholds))
    assert tuple(found) == ALARMS
    return {name: np.flatnonzero(flags).tolist() for name, flags in found.items() if flags.any()}


def test_nothing_fires_where_nothing_was_measured():
    assert fired(course(30)) == {}


def test_two_reward_models_at_odds_for_five_evaluations():
    # z_a = 2; z_b = 1.2 is a divergence of .4, and 1.9 one of .05.
    twin = [1.2] * 3 + [1.9] + [1.2] * 6
    now = course(10, proxy=[4] * 10, held_out=[2 + 2 * z for z in twin])
    assert relative_divergence(column(2), column(1.2))[0] == pytest.approx(0.4)
    assert fired(now) == {"divergence": [8, 9]}
    assert fired(now, divergence=0.41) == {}
    assert fired(now, in_a_row=3) == {"divergence": [2, 6, 7, 8, 9]}


def test_reward_that_rises_where_gold_falls():
    rise = list(np.arange(22) / 10 + 2)
    now = course(22, proxy=rise, gold=rise[::-1])
    assert fired(now) == {"gold": [19, 20, 21]}
    assert fired(course(22, proxy=rise, gold=rise)) == {}
    assert fired(now, window=3) == {"gold": list(range(2, 22))}


def test_kl_length_and_refusals():
    now = course(3, kl=(1, 10, 10.5), length=(10, 15, 15.1), refusals=(0.25, 0.5, 0.51))
    assert fired(now, kl_max=10) == {"kl": [2], "length": [2], "refusals": [2]}
    assert fired(now) == {"length": [2], "refusals": [2]}
    assert fired(now, length=2.0, refusals=3.0, kl_target=1) == {"diverged": [2]}


def test_a_reward_below_the_start_must_stay_there():
    now = course(7, proxy=[1.9, 2.1, 1.9, 1.9, 1.9, 1.9, 1.9])
    assert fired(now) == {"diverged": [6]}


def test_accuracy_among_samples_of_a_prompt():
    scores = np.array([[1.0, 2, 3], [5, 5, 0]])
    truth = np.array([[1.0, 3, 2], [1, 0, 0]])
    # First prompt: right, right, wrong. Second: a tie, right, and a pair that is equal in truth.
    assert within_prompt_accuracy(scores, truth) == pytest.approx((2 + 0.5 + 1) / 5)
    assert math.isnan(within_prompt_accuracy(scores, np.ones((2, 3))))
    assert math.isnan(within_prompt_accuracy(np.ones((2, 1)), np.arange(2.0)[:, None]))
    assert math.isnan(within_prompt_accuracy(scores, np.full((2, 3), NAN)))


def slow_interval(a, b, block, resamples, seed):
    """The bootstrap as a loop."""
    count = len(a)
    blocks = -(-count // block)
    starts = np.random.default_rng(seed).integers(0, count, (resamples, blocks))
    found = []
    for row in starts:
        index = [(s + i) % count for s in row for i in range(block)][:count]
        found.append(correlation(a[index], b[index]))
    return np.quantile([x for x in found if not math.isnan(x)], (0.025, 0.975))


@pytest.mark.parametrize("block", [1, 3, 0])
def test_an_interval_is_that_of_the_bootstrap_over_blocks(block):
    rng = np.random.default_rng(1)
    x = np.cumsum(rng.normal(size=28))
    y = x + rng.normal(size=28)
    link = correlation_interval(x, y, block=block, resamples=200, seed=5)
    assert link.value == pytest.approx(np.corrcoef(x, y)[0, 1]) and link.count == 28
    np.testing.assert_allclose(link[1:3], slow_interval(x, y, block or 4, 200, 5))  # ⌈28^(1/3)⌉
    assert link.low < link.value < link.high


def test_points_that_were_not_measured_are_left_out():
    x = np.arange(12.0)
    link = correlation_interval(np.append(x, NAN), np.append(-x, 1.0))
    np.testing.assert_allclose(link[:3], -1)
    assert link.count == 12


def test_too_little_has_no_interval():
    few = correlation_interval(column(1, 2, 3), column(1, 2, 4))
    assert few.count == 3 and few.value > 0.9 and math.isnan(few.low)
    flat = correlation_interval(np.ones(20), np.arange(20.0))
    assert math.isnan(flat.value) and math.isnan(flat.low)
    # One of 16 points differs: most draws of two blocks of 8 hold it, of which all is known.
    spike = np.zeros(16)
    spike[3] = 1.0
    np.testing.assert_allclose(correlation_interval(spike, spike, block=8)[:3], 1.0)


def test_the_links_are_the_three_pairs():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 16))
    found = links(a, b, c, block=1)
    wanted = {
        "reward model -> policy reward": (a, b),
        "policy reward -> gold": (b, c),
        "reward model -> gold": (a, c),
    }
    assert found == {name: correlation_interval(*pair, block=1) for name, pair in wanted.items()}
