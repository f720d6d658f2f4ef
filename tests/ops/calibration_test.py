"""Calibration against plain loops, against a grid of temperatures, and on claims that are true."""

import math

import numpy as np
import pytest
from scipy import special

from rlhf_jax.ops import calibration as cal
from rlhf_jax.ops.reward_metrics import brier

RNG = np.random.default_rng(0)


def slow_ece(probabilities, labels, bins, least):
    total = 0.0
    for b in range(bins):
        low = least + (1 - least) * b / bins
        high = least + (1 - least) * (b + 1) / bins
        last = b == bins - 1
        inside = [
            (p, z)
            for p, z in zip(probabilities, labels, strict=True)
            if low <= p < high or (last and p == 1.0)
        ]
        if inside:
            gap = sum(z for _, z in inside) / len(inside) - sum(p for p, _ in inside) / len(inside)
            total += len(inside) / len(probabilities) * abs(gap)
    return total


def test_ece_by_hand():
    # Two bins: 0.25 and 0.35 with labels 0, 1 (gap 0.2), 0.9 with label 1 (gap 0.1).
    found = cal.expected_calibration_error(np.array([0.25, 0.35, 0.9]), np.array([0, 1, 1]), bins=2)
    assert found == pytest.approx(2 / 3 * 0.2 + 1 / 3 * 0.1, abs=1e-12)


@pytest.mark.parametrize(("bins", "least"), [(15, 0.0), (10, 0.5), (1, 0.0)])
def test_ece_against_a_loop_over_bins(bins, least):
    probabilities = least + (1 - least) * RNG.random(300)
    probabilities[:2] = least, 1.0
    labels = RNG.integers(0, 2, 300)
    found = cal.expected_calibration_error(probabilities, labels, bins=bins, least=least)
    assert found == pytest.approx(slow_ece(probabilities, labels, bins, least), abs=1e-12)


def test_ece_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match=r"0\.2 to 0\.2; wanted some from 0\.5 to 1"):
        cal.expected_calibration_error(np.array([0.2]), np.ones(1), least=0.5)
    with pytest.raises(ValueError, match="probabilities none"):
        cal.expected_calibration_error(np.zeros(0), np.zeros(0))


def test_log_loss_is_the_plain_one_and_survives_large_logits():
    logits, labels = RNG.normal(size=50), RNG.random(50)
    p = special.expit(logits)
    plain = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert cal.log_loss(logits, labels) == pytest.approx(plain, abs=1e-12)
    assert cal.log_loss(np.array([1e4, -1e4]), np.array([1.0, 1.0])) == 5000.0


def test_the_temperature_is_the_best_of_a_fine_grid():
    truth = RNG.normal(size=400) * 2
    labels = (RNG.random(400) < special.expit(truth)).astype(float)
    found = cal.fit_temperature(truth * 3, labels)
    grid = np.exp(np.linspace(-2, 4, 6001))
    losses = [cal.log_loss(truth * 3 / t, labels) for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)
    assert cal.log_loss(truth * 3 / found, labels) <= min(losses) + 1e-12
    assert 2.0 < found < 4.5  # the logits are three times what they should be


def test_temperatures_at_the_ends():
    assert cal.fit_temperature(np.ones(9), np.ones(9)) < 0.02  # never wrong
    assert cal.fit_temperature(np.ones(9), np.zeros(9)) > 1e3  # always wrong


def test_a_calibrated_predictor_has_the_brier_score_of_its_own_doubt():
    # A-PPE-1: Brier of a perfectly calibrated predictor = mean p(1 - p) within 3 standard errors.
    p = RNG.random(4000)
    z = (RNG.random(4000) < p).astype(float)
    error = np.std((p - z) ** 2) / math.sqrt(4000)
    assert abs(brier(p, z) - np.mean(p * (1 - p))) < 3 * error
    found = cal.calibration(special.logit(p), z, np.arange(4000) % 2)
    assert found.temperature == pytest.approx(1.0, abs=0.1)
    assert found.ece < 0.03 and abs(found.ece_scaled - found.ece) < 0.02


def test_scaling_mends_overconfidence_and_is_fitted_elsewhere():
    truth = RNG.normal(size=2000)
    z = (RNG.random(2000) < special.expit(truth)).astype(float)
    fold = np.arange(2000) % 2
    found = cal.calibration(truth * 5, z, fold)
    assert found.ece > 0.15 and found.ece_scaled < 0.05
    assert found.brier_scaled < found.brier and found.log_loss_scaled < found.log_loss
    assert found.temperature == pytest.approx(5.0, rel=0.2)
    # Labels of a fold do not reach its own temperature.
    other = z.copy()
    other[fold == 0] = 1 - other[fold == 0]
    scaled = cal.scale_held_out(truth * 5, z, fold)
    changed = cal.scale_held_out(truth * 5, other, fold)
    np.testing.assert_array_equal(scaled[fold == 0], changed[fold == 0])
    assert (scaled[fold == 1] != changed[fold == 1]).any()
    with pytest.raises(ValueError, match="one of the two folds is empty"):
        cal.scale_held_out(truth, z, np.zeros(2000, int))


def test_claims_of_pairs_do_not_depend_on_which_half_comes_first():
    chosen, rejected = np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 3.0])
    logits, labels = cal.pair_claims(chosen, rejected)
    np.testing.assert_array_equal(logits, [1, 0, 3])
    np.testing.assert_array_equal(labels, [1, 0.5, 0])
    # mean (1 - sigma(d))^2 is the same number, but for ties, where the label is ½.
    d = np.array([1.0, -3.0])
    logits, labels = cal.pair_claims(d, np.zeros(2))
    assert brier(special.expit(logits), labels) == pytest.approx(
        float(np.mean((1 - special.expit(d)) ** 2)), abs=1e-12
    )
