"""Numbers of reward sets where a run of a model would not reach them."""

import math

import numpy as np
import pytest

from rlhf_jax import reward_numbers as rn
from rlhf_jax.data.plain_forms import Pair, Samples, Solution

RNG = np.random.default_rng(0)


def findings(items, scores, lengths=None, groups=None):
    given = np.asarray(scores, float)
    lengths = np.ones(given.shape, int) if lengths is None else lengths
    groups = np.arange(len(items)) if groups is None else groups
    return rn.pair_findings(items, given, lengths, groups, resamples=20, seed=0)


def test_the_mean_and_the_worst_of_categories_that_have_enough():
    # 10 of a with 6 right, 20 of b with 16 right, 9 of c, which are too few to count, all wrong.
    right = [1] * 6 + [0] * 4 + [1] * 16 + [0] * 4 + [0] * 9
    names = "a" * 10 + "b" * 20 + "c" * 9
    items = [Pair(f"p{i}", "x", "y", {"kind": name}) for i, name in enumerate(names)]
    found = findings(items, [(z, 0.5) for z in right])
    assert found.numbers["kind_mean"].value == pytest.approx((0.6 + 0.8) / 2, abs=1e-12)
    assert found.numbers["kind_worst"].value == pytest.approx(0.6, abs=1e-12)
    assert found.numbers["accuracy"].value == pytest.approx(22 / 39, abs=1e-12)
    worst = found.categories["kind"]["c"]
    assert (worst.value.value, worst.count) == (0.0, 9) and worst.value.high > 0.2


def test_pairs_of_one_prompt_widen_the_interval():
    items = [Pair("p", "x", "y")] * 60
    scores = [(z, 0.5) for z in np.repeat(RNG.integers(0, 2, 12), 5)]
    alone, together = findings(items, scores), findings(items, scores, groups=np.arange(60) // 5)
    widths = [
        one.numbers["accuracy"].high - one.numbers["accuracy"].low for one in (alone, together)
    ]
    assert widths[1] > 1.8 * widths[0]


def test_one_prompt_cannot_be_scaled_on_another():
    found = findings([Pair("p", "x", "y")] * 4, [(1, 0)] * 4, groups=np.zeros(4, int)).numbers
    assert found["brier"].value == pytest.approx((1 - 1 / (1 + math.exp(-1))) ** 2, abs=1e-12)
    assert math.isnan(found["ece_scaled"].value) and "x/ece_scaled" not in rn.flat(
        {"x": rn.Findings(found, {})}
    )


def test_two_models_or_strangers_have_no_ranking():
    two = [Pair("p", "x", "y", models=("m", "n"))] * 4
    apart = [Pair("p", "x", "y", models=names) for names in (("m", "n"), ("o", "q"))] * 2
    for items in (two, apart):
        assert "ranking_spearman" not in findings(items, [(1, 0)] * 4).numbers
    ring = [Pair("p", "x", "y", models=names) for names in (("m", "n"), ("n", "o"), ("m", "o"))]
    assert findings(ring, [(1, 0)] * 3).numbers["ranking_spearman"].value == pytest.approx(1.0)


def test_ties_of_people_are_told_apart_by_a_threshold():
    items = [Pair("p", "x", "y", tie=tie) for tie in (True, True, False, False)]
    found = findings(items, [(0.1, 0), (0, 0.2), (1, 0), (0, 2)]).numbers
    assert found["accuracy"].value == 0.5  # of the two that people decided
    assert found["tie_accuracy"].value == 0.25  # nothing is called a tie, and one of two is wrong
    assert (found["tie_accuracy_best"].value, found["tie_threshold"].value) == (0.75, 0.2)
    assert found["tie_majority_rate"].value == 0.5


def test_longer_samples_win_where_length_decides():
    correct = [[True, False, False], [False, True, True], [True, True, True]]
    items = [Samples(f"p{i}", ["a", "b", "c"], bits) for i, bits in enumerate(correct)]
    lengths = [np.array(n) for n in ([9, 2, 2], [1, 5, 6], [4, 4, 4])]
    scores = [x.astype(float) for x in lengths]
    found = rn.sample_findings(items, scores, lengths, np.arange(3), resamples=20, seed=0)
    numbers = found.numbers
    assert numbers["best_of_k"].value == numbers["longest_of_k"].value == 1.0
    assert numbers["prompt_auc_longer"].value == 1.0 and numbers["prompts_with_both"].value == 2
    assert numbers["length_correlation"].value == pytest.approx(1.0)
    assert numbers["best_of_loss"].value == pytest.approx(0.0, abs=1e-12)
    # Best of 2: the right one is drawn in 2 of 3 pairs, then all 3, then all.
    assert found.curves["model"][1] == pytest.approx((2 / 3 + 1 + 1) / 3, abs=1e-12)


def test_steps_without_a_label_do_not_count():
    items = [Solution("p", ["a", "b", "c"], [1.0, 0.0, None], 1), Solution("q", ["a"], [1.0], -1)]
    steps = [np.array([1.0, -1.0, 9.0]), np.array([2.0])]
    found = rn.solution_findings(
        items, steps, None, np.array([3, 1]), np.arange(2), threshold=0.0, resamples=20, seed=0
    ).numbers
    assert found["steps"].value == 3 and found["step_accuracy"].value == 1.0
    assert found["f1"].value == 1.0 and found["step_auc"].value == 1.0
    assert found["length_auc"].value == 1.0  # the flawless one is the shorter one
    assert "outcome_auc" not in found
