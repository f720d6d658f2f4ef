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
    assert rm.auc(scores, labels) == pytest.approx(np.mean(wins), abs=1e-12)
    assert rm.auc(labels.astype(float), labels) == 1.0
    assert rm.auc(-labels.astype(float), labels.astype(bool)) == 0.0
    assert rm.auc(np.zeros(40), labels) == 0.5
    assert math.isnan(rm.auc(scores, np.ones(40)))


def test_kappa_by_hand():
    # They agree on 4 of 5; by chance on 2/5 · 3/5 + 2/5 · 1/5 + 1/5 · 1/5 = 9/25.
    first, second = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 2])
    assert rm.cohen_kappa(first, second) == pytest.approx((20 - 9) / (25 - 9), abs=1e-12)
    assert rm.cohen_kappa(first, first) == 1.0
    assert rm.cohen_kappa(np.array([0, 1]), np.array([1, 0])) == -1.0
    assert rm.cohen_kappa(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == 0.0
    assert math.isnan(rm.cohen_kappa(np.ones(3), np.ones(3)))


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
    # Mean 2, s = 1, and t = 4.302653 with two degrees of freedom: 2 ± t / sqrt(3).
    mean, low, high = rm.mean_interval(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose([mean, low, high], [2, 2 - 2.484138, 2 + 2.484138], rtol=1e-6)
    few = [rm.mean_interval(RNG.normal(5, 3, 4)) for _ in range(800)]
    assert 0.925 < np.mean([low < 5 < high for _, low, high in few]) < 0.975
    draws = [rm.mean_interval(RNG.normal(5, 3, 50)) for _ in range(400)]
    assert 0.91 < np.mean([low < 5 < high for _, low, high in draws]) < 0.98
    with pytest.raises(ValueError, match="1 values have no interval"):
        rm.mean_interval(np.ones(1))


def test_prompt_intervals_of_shares_stay_shares():
    mean, low, high = rm.prompt_interval(np.array([0.0, 0.0, 1.0]), share=True)
    assert mean == pytest.approx(1 / 3) and 0 <= low < mean < high <= 1
    # Five successes do not prove that it always works.
    assert rm.prompt_interval(np.ones(5), share=True)[1] < 1.0
    values = np.array([-1.0, 0.5, 2.0])
    assert rm.prompt_interval(values, share=False) == pytest.approx(rm.mean_interval(values))
    # Values that come again within a group say nothing new.
    twice, groups = np.repeat(values, 2), np.repeat([5, 1, 3], 2)
    again = rm.prompt_interval(twice, share=False, groups=groups)
    assert again == pytest.approx(rm.mean_interval(values))


def test_scores_that_are_not_numbers_have_no_order():
    scores, gold = np.array([[1.0, 2.0, np.nan]]), np.array([[0.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        rm.best_of_k(scores, gold, (2,))
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        rm.auc(scores[0], gold[0])


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


@pytest.mark.parametrize("ties", [False, True])
def test_every_subset_up_to_twelve_samples(ties):
    # A-PPE-1: all C(M, K) subsets for M up to 12, to 1e-12.
    for samples in (1, 7, 12):
        scores = RNG.integers(0, 4, samples) if ties else RNG.normal(size=samples)
        gold = RNG.normal(size=samples)
        sizes = list(range(1, samples + 1))
        found = rm.best_of_k_curves([scores.astype(float)], [gold], sizes)[0]
        for size, value in zip(sizes, found, strict=True):
            total = 0.0
            for subset in itertools.combinations(range(samples), size):
                top = max(scores[i] for i in subset)
                total += np.mean([gold[i] for i in subset if scores[i] == top])
            assert value == pytest.approx(total / math.comb(samples, size), abs=1e-12)


def test_prompts_with_different_numbers_of_samples():
    scores = [RNG.normal(size=3), RNG.normal(size=5)]
    gold = [RNG.normal(size=3), RNG.normal(size=5)]
    found = rm.best_of_k_curves(scores, gold, [1, 3])
    for row in range(2):
        wanted = rm.best_of_k(scores[row][None], gold[row][None], [1, 3])
        np.testing.assert_allclose(found[row], wanted, atol=1e-12)
    with pytest.raises(ValueError, match="size 4 of best_of_k; wanted 1 to 3"):
        rm.best_of_k_curves(scores, gold, [4])


def test_aucs_within_prompts_against_all_pairs():
    scores = [RNG.integers(0, 4, k).astype(float) for k in (6, 9, 4)]
    labels = [RNG.integers(0, 2, 6), RNG.integers(0, 2, 9), np.ones(4, int)]
    labels[0][:2] = labels[1][:2] = 0, 1
    found = rm.prompt_aucs(scores, labels)
    for s, z, value in list(zip(scores, labels, found, strict=True))[:2]:
        wins = [(p > n) + 0.5 * (p == n) for p in s[z == 1] for n in s[z == 0]]
        assert value == pytest.approx(np.mean(wins), abs=1e-12)
    assert math.isnan(found[2])


def test_pass_rates_on_random_matrices():
    # A-PPE-3: prompts with a pass rate outside [0.1, 0.9] are excluded.
    for samples in (1, 4, 10, 32):
        correct = [RNG.random(samples) < share for share in RNG.random(60)]
        correct += [np.ones(samples, bool), np.zeros(samples, bool)]
        kept = rm.within_pass_rates(correct)
        for row, keep in zip(correct, kept, strict=True):
            right = sum(row.tolist())
            assert keep == (10 * right >= samples and 10 * right <= 9 * samples)
    tenth = [np.arange(10) < 1, np.arange(10) < 9]
    assert rm.within_pass_rates(tenth).all()  # both ends belong to it
    assert rm.within_pass_rates([np.ones(3, bool)], low=0.0, high=1.0).all()


def test_shares_of_pairs():
    chosen, rejected = np.array([2.0, 1.0, 0.0, 3.0]), np.array([1.0, 1.0, 5.0, -3.0])
    assert rm.pair_shares(chosen, rejected) == (0.5, 0.25, 0.25)


@pytest.mark.parametrize("digits", [0, 3])
def test_ties_against_every_threshold(digits):
    margins = np.round(RNG.normal(size=60), digits)
    outcomes = RNG.integers(-1, 2, 60)

    def slow(threshold):
        said = [0 if abs(d) <= threshold else (1 if d > 0 else -1) for d in margins]
        return np.mean([s == y for s, y in zip(said, outcomes, strict=True)])

    assert rm.tie_accuracy(margins, outcomes, threshold=0.5) == pytest.approx(slow(0.5), abs=1e-12)
    threshold, best = rm.best_tie_threshold(margins, outcomes)
    assert best == pytest.approx(max(map(slow, [0.0, *np.abs(margins)])), abs=1e-12)
    assert rm.tie_accuracy(margins, outcomes, threshold=threshold) == pytest.approx(best, abs=1e-12)


def test_clustered_interval():
    values = (RNG.random(200) < 0.7).astype(float)
    alone = rm.clustered_interval(values, np.arange(200))
    assert alone == pytest.approx(rm.wilson_interval(values.sum(), 200), abs=2e-3)
    # Values that only repeat each other are worth one each.
    repeated = rm.clustered_interval(np.repeat(values, 9), np.repeat(np.arange(200), 9))
    assert repeated == pytest.approx(alone, abs=1e-12)
    assert rm.clustered_interval(np.ones(12), np.repeat(np.arange(4), 3)) == pytest.approx(
        rm.wilson_interval(4, 4)
    )
    assert rm.clustered_interval(np.zeros(0), np.zeros(0)) == (0.0, 1.0)
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        shares = np.repeat(rng.beta(2, 2, 60), 5)  # mean ½, alike within groups of five
        drawn = (rng.random(300) < shares).astype(float)
        low, high = rm.clustered_interval(drawn, np.repeat(np.arange(60), 5))
        inside += low <= 0.5 <= high
    assert 0.9 <= inside / 100 <= 0.99
