"""Metrics of scores against enumeration of every pair and every subset."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.ops import reward_metrics as rm

RNG = np.random.default_rng(0)


def test_pair_accuracy_counts_ties_as_half():
    chosen, rejected = np.array([2.0, 1.0, 0.0, 3.0]), np.array([1.0, 1.0, 5.0, -3.0])
    assert rm.pair_accuracy(chosen, rejected) == (1 + 0.5 + 0 + 1) / 4
    np.testing.assert_array_equal(rm.pair_correct(chosen, rejected), [1, 0.5, 0, 1])
    assert rm.pair_accuracy(np.zeros(5), np.zeros(5)) == 0.5


def test_auc_against_all_pairs():
    scores = RNG.integers(0, 6, 40).astype(float)  # many ties
    labels = RNG.integers(0, 2, 40)
    wins = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert rm.auc(scores, labels) == pytest.approx(np.mean(wins))
    assert rm.auc(labels.astype(float), labels) == 1.0
    assert rm.auc(-labels.astype(float), labels.astype(bool)) == 0.0
    assert rm.auc(np.zeros(40), labels) == 0.5
    assert math.isnan(rm.auc(scores, np.ones(40)))


def test_balanced_accuracy_ignores_how_many_there_are_of_each():
    scores, labels = np.array([1.0, -1.0, -2.0, -3.0, 4.0]), np.array([1, 1, 0, 0, 0])
    assert rm.balanced_accuracy(scores, labels) == pytest.approx(0.5 * (1 / 2 + 2 / 3))
    assert rm.balanced_accuracy(np.full(5, -9.0), labels) == 0.5
    assert rm.balanced_accuracy(scores, labels, threshold=3.0) == pytest.approx(0.5 * (0 + 2 / 3))
    assert math.isnan(rm.balanced_accuracy(scores, np.zeros(5)))


def test_brier_by_hand():
    assert rm.brier(np.array([0.5, 0.5]), np.array([0, 1])) == 0.25
    assert rm.brier(np.array([1.0, 0.2]), np.array([1.0, 0.0])) == pytest.approx(0.02)


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_k_against_every_subset(ties):
    scores = RNG.normal(size=(3, 5)) if not ties else RNG.integers(0, 3, (3, 5)).astype(float)
    gold = RNG.normal(size=(3, 5))
    sizes = [1, 2, 3, 5]
    found = rm.best_of_k(scores, gold, sizes)
    for j, size in enumerate(sizes):
        wanted = []
        for row in range(3):
            for subset in itertools.combinations(range(5), size):
                top = max(scores[row, i] for i in subset)
                wanted.append(np.mean([gold[row, i] for i in subset if scores[row, i] == top]))
        assert found[j] == pytest.approx(np.mean(wanted))


def test_best_of_k_reductions():
    scores, gold = RNG.normal(size=(2, 4, 6))
    curve = rm.best_of_k(scores, gold, [1, 6])
    assert curve[0] == pytest.approx(gold.mean())
    assert curve[1] == pytest.approx(np.mean(gold[np.arange(4), scores.argmax(1)]))
    solved = np.array([[1.0, 0.0, 0.0, 1.0]])  # pass@2 = 1 - C(2,2)/C(4,2)
    assert rm.best_of_k(solved, solved, [2])[0] == pytest.approx(1 - 1 / 6)
    with pytest.raises(ValueError, match="size 7 of best_of_k; wanted 1 to 6"):
        rm.best_of_k(scores, gold, [7])


def test_wilson_interval():
    low, high = rm.wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # textbook values
    assert rm.wilson_interval(0, 10)[0] == 0.0 and 0.2 < rm.wilson_interval(0, 10)[1] < 0.35
    assert rm.wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert rm.wilson_interval(0, 0) == (0.0, 1.0)
    narrow = rm.wilson_interval(800, 1000)
    assert low < narrow[0] < 0.8 < narrow[1] < high


def test_mean_interval_by_hand_and_its_coverage():
    # Mean 2, s = 1, so 2 ± 1.96 / sqrt(3).
    mean, low, high = rm.mean_interval(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose([mean, low, high], [2, 2 - 1.131586, 2 + 1.131586], rtol=1e-6)
    draws = [rm.mean_interval(RNG.normal(5, 3, 50)) for _ in range(400)]
    assert 0.91 < np.mean([low < 5 < high for _, low, high in draws]) < 0.98
    with pytest.raises(ValueError, match="1 values have no interval"):
        rm.mean_interval(np.ones(1))


def test_bootstrap_covers_the_truth_and_respects_texts():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(40):
        labels = [rng.integers(0, 2, size=1) for _ in range(60)]
        scores = [rng.normal(size=1) + label for label in labels]
        low, high = rm.bootstrap_interval(rm.auc, scores, labels, resamples=100, seed=seed)
        inside += low <= 0.7602 <= high  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    assert inside >= 33
    # Steps that only repeat each other do not make an interval narrower.
    twice = [np.repeat(x, 5) for x in scores], [np.repeat(x, 5) for x in labels]
    repeated = rm.bootstrap_interval(rm.auc, *twice, resamples=100, seed=39)
    assert repeated == pytest.approx((low, high))
