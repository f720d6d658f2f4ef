"""Rankings against loops over pairs and against a general optimiser."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, special

from rlhf_jax.ops import rankings as rk

RNG = np.random.default_rng(0)


def battles(strengths, count, rng=RNG):
    """Random pairs of models and who wins, by Bradley-Terry."""
    first = rng.integers(0, len(strengths), count)
    second = (first + rng.integers(1, len(strengths), count)) % len(strengths)
    won = rng.random(count) < special.expit(strengths[first] - strengths[second])
    return first, second, won.astype(float)


def test_win_counts_and_shares_by_hand():
    first, second = np.array([0, 0, 1, 2]), np.array([1, 1, 0, 0])
    wins = rk.win_counts(first, second, np.array([1.0, 0.5, 1.0, 0.0]), models=4)
    np.testing.assert_array_equal(wins[:3, :3], [[0, 1.5, 1], [1.5, 0, 0], [0, 0, 0]])
    shares = rk.win_shares(wins)
    assert shares[0, 1] == 0.5 and shares[2, 0] == 0.0 and math.isnan(shares[1, 2])
    np.testing.assert_array_equal(rk.mean_win_share(wins)[:3], [0.75, 0.5, 0.0])
    assert math.isnan(rk.mean_win_share(wins)[3])


def test_strengths_against_a_general_optimiser():
    truth = np.array([1.0, 0.3, -0.2, -1.1])
    wins = rk.win_counts(*battles(truth, 400), models=4)
    for prior in (0.0, 0.5):
        w = wins + prior * (wins + wins.T > 0)

        def loss(theta, w=w):
            return -np.sum(w * np.log(special.expit(theta[:, None] - theta)))

        found = rk.bradley_terry_strengths(wins, prior=prior)
        best = optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
        np.testing.assert_allclose(found, best - best.mean(), atol=1e-5)
        # Where the likelihood is greatest, expected wins are the wins.
        p = special.expit(found[:, None] - found)
        np.testing.assert_allclose(((w + w.T) * p).sum(1), w.sum(1), atol=1e-9)
    assert np.abs(rk.bradley_terry_strengths(wins, prior=0.0) - truth).max() < 0.5


def test_two_models_have_the_log_odds():
    wins = np.array([[0.0, 30.0], [10.0, 0.0]])
    found = rk.bradley_terry_strengths(wins, prior=0.0)
    assert found[0] - found[1] == pytest.approx(math.log(3), abs=1e-12)
    lopsided = np.array([[0.0, 1e6], [1.0, 0.0]])  # far from where Newton starts
    found = rk.bradley_terry_strengths(lopsided, prior=0.0)
    assert found[0] - found[1] == pytest.approx(math.log(1e6), abs=1e-9)


def test_strengths_that_do_not_exist():
    with pytest.raises(ValueError, match="2 parts"):
        rk.bradley_terry_strengths(np.kron(np.eye(2), np.array([[0, 1], [1, 0]])))
    with pytest.raises(ValueError, match="set prior above 0"):
        rk.bradley_terry_strengths(np.array([[0.0, 3.0], [0.0, 0.0]]), prior=0.0)
    assert rk.bradley_terry_strengths(np.array([[0.0, 3.0], [0.0, 0.0]]))[0] > 0


def test_kendall_and_spearman_against_loops():
    # A-PPE-1: Kendall against O(n^2).
    a, b = RNG.permutation(9).astype(float), RNG.permutation(9).astype(float)
    spearman, kendall = rk.rank_correlations(a, b)
    signs = [np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in itertools.combinations(range(9), 2)]
    assert kendall == pytest.approx(sum(signs) / math.comb(9, 2), abs=1e-12)
    assert spearman == pytest.approx(1 - 6 * sum((a - b) ** 2) / (9 * 80), abs=1e-12)
    assert all(map(math.isnan, rk.rank_correlations(a, np.zeros(9))))

    # With ties tau-b: pairs that are tied in one of the two count for neither side there.
    a, b = RNG.integers(0, 4, 30).astype(float), RNG.integers(0, 4, 30).astype(float)
    total = untied_a = untied_b = 0
    for i, j in itertools.combinations(range(30), 2):
        total += np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
        untied_a, untied_b = untied_a + (a[i] != a[j]), untied_b + (b[i] != b[j])
    wanted = total / math.sqrt(untied_a * untied_b)
    assert rk.rank_correlations(a, b)[1] == pytest.approx(wanted, abs=1e-12)


def test_row_pearson_against_numpy():
    a, b = RNG.random((4, 4)), RNG.random((4, 4))
    a[np.eye(4, dtype=bool)] = b[np.eye(4, dtype=bool)] = np.nan
    b[0, 2] = np.nan  # a pair that only one judge saw
    wanted = []
    for i in range(4):
        kept = [j for j in range(4) if i != j and not math.isnan(b[i, j])]
        wanted.append(np.corrcoef(a[i, kept], b[i, kept])[0, 1])
    assert rk.row_pearson(a, b) == pytest.approx(np.mean(wanted), abs=1e-12)
    assert math.isnan(rk.row_pearson(np.full((2, 2), 0.5), b[:2, :2]))


def test_separability_and_agreement_against_loops():
    a, b = (np.sort(RNG.normal(size=(2, 6)) + np.arange(6), axis=0) for _ in range(2))
    apart = agree = 0
    for i, j in itertools.combinations(range(6), 2):
        first = int(a[0, i] > a[1, j]) - int(a[0, j] > a[1, i])
        second = int(b[0, i] > b[1, j]) - int(b[0, j] > b[1, i])
        apart += first != 0
        agree += first * second
    assert 0 < apart < 15
    assert rk.separability(a) == pytest.approx(apart / 15, abs=1e-12)
    assert rk.confidence_agreement(a, b) == pytest.approx(agree / 15, abs=1e-12)
    assert rk.confidence_agreement(a, -a[::-1]) == pytest.approx(-apart / 15, abs=1e-12)


def test_order_brier_against_a_loop():
    draws, truth = np.round(RNG.normal(size=(7, 4)), 1), np.array([0.5, 0.5, -1.0, 2.0])
    total = 0.0
    for i, j in itertools.combinations(range(4), 2):
        p = np.mean([(d[i] > d[j]) + 0.5 * (d[i] == d[j]) for d in draws])
        total += (p - ((truth[i] > truth[j]) + 0.5 * (truth[i] == truth[j]))) ** 2
    assert rk.order_brier(draws, truth) == pytest.approx(total / 6, abs=1e-12)


def test_a_judge_agrees_with_itself_and_not_with_its_opposite():
    strengths = np.array([2.0, 0.7, -0.7, -2.0])
    first, second, won = battles(strengths, 600, np.random.default_rng(1))
    same = rk.agreement(first, second, won, won, models=4, resamples=40)
    assert same.spearman == same.kendall == 1.0
    assert same.row_pearson == pytest.approx(1.0, abs=1e-12)
    assert same.separability == same.confidence == 1.0 and same.brier == 0.0
    turned = rk.agreement(first, second, 1 - won, won, models=4, resamples=40)
    assert turned.spearman == turned.kendall == -1.0
    assert turned.confidence == -1.0 and turned.brier == 1.0
    coin = np.full(600, 0.5)
    assert rk.agreement(first, second, coin, won, models=4, resamples=40).separability == 0.0


def test_the_bootstrap_covers_the_truth():
    strengths = np.array([0.8, 0.0, -0.8])
    inside = []
    for seed in range(15):
        drawn = battles(strengths, 300, np.random.default_rng(seed))
        low, high = rk.intervals(
            rk.bootstrap_strengths(*drawn, models=3, resamples=60, seed=seed, prior=0.5)
        )
        inside.append((low <= strengths) & (strengths <= high))
    assert np.mean(inside) > 0.8
