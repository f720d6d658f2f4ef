"""Step metrics by hand, against loops and against every threshold."""

import math

import numpy as np
import pytest

from rlhf_jax.ops import process_metrics as pm
from rlhf_jax.ops.step_labels import aggregate

RNG = np.random.default_rng(0)


def test_the_first_wrong_step():
    assert pm.first_wrong(np.array([1.0, -0.1, -5.0])) == 1
    assert pm.first_wrong(np.array([1.0, 2.0])) == -1
    assert pm.first_wrong(np.array([0.0])) == 0  # P = ½ is not above it
    assert pm.first_wrong(np.array([1.0, 2.0]), threshold=1.5) == 0


@pytest.mark.parametrize("how", ["min", "product", "mean", "last", "sum"])
def test_one_logit_of_the_steps(how):
    """As `aggregate` says, and of distinct solutions distinct where float32 has only 1."""
    for _ in range(20):
        steps = RNG.normal(0, 3, RNG.integers(1, 7))
        wanted = float(aggregate(np.float32(steps), np.ones(len(steps), bool), how=how))
        found = pm.aggregate_logit(list(steps), how=how)
        assert (found if how == "sum" else 1 / (1 + math.exp(-found))) == pytest.approx(
            wanted, rel=1e-5, abs=1e-6
        )
    sure = [pm.aggregate_logit([50.0, logit], how=how) for logit in (17.0, 20.0, 25.0, 40.0)]
    unsure = [pm.aggregate_logit([-90.0, logit], how=how) for logit in (-300.0, -120.0, -90.0)]
    assert sure == sorted(set(sure)) and all(map(math.isfinite, sure + unsure))
    assert how == "mean" or unsure == sorted(set(unsure))
    assert pm.aggregate_logit([], how=how) == pytest.approx(0.0, abs=1e-15)


def test_more_sure_steps_are_worth_less_to_a_product():
    logits = [pm.aggregate_logit([40.0] * count, how="product") for count in (1, 2, 5)]
    np.testing.assert_allclose(logits, 40.0 - np.log([1, 2, 5]), rtol=1e-12)
    with pytest.raises(ValueError, match="how='median'"):
        pm.aggregate_logit([1.0], how="median")


def test_first_error_by_hand():
    # Three with an error, two found; two without, one told so: F1 = 2 * 2/3 * 1/2 / (2/3 + 1/2).
    found = pm.first_error(np.array([1, 0, -1, -1, 3]), np.array([1, 0, 2, -1, -1]))
    assert found.error_accuracy == pytest.approx(2 / 3, abs=1e-12)
    assert found.correct_accuracy == 0.5
    assert found.f1 == pytest.approx(4 / 7, abs=1e-12)
    assert pm.first_error(np.array([0, 0]), np.array([1, -1])).f1 == 0.0


def test_one_kind_of_solution_has_no_f1():
    found = pm.first_error(np.array([0, 1]), np.array([0, 2]))
    assert found.error_accuracy == 0.5
    assert math.isnan(found.correct_accuracy) and math.isnan(found.f1)
    assert all(map(math.isnan, pm.first_error_interval(np.array([0, 1]), np.array([0, 2]))))
    assert math.isnan(pm.blind_f1(np.array([0, 2])))


def test_the_interval_is_that_of_a_plain_bootstrap():
    wanted = np.where(RNG.random(200) < 0.4, -1, RNG.integers(0, 4, 200))
    found = np.where(RNG.random(200) < 0.6, wanted, RNG.integers(0, 4, 200))
    low, high = pm.first_error_interval(found, wanted)
    kinds = [np.flatnonzero(wanted == -1), np.flatnonzero(wanted != -1)]
    draws = []
    for _ in range(2000):
        index = np.concatenate([RNG.choice(kind, len(kind)) for kind in kinds])
        draws.append(pm.first_error(found[index], wanted[index]).f1)
    assert (low, high) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))), abs=0.01)
    assert low < pm.first_error(found, wanted).f1 < high


def test_blind_f1_is_the_best_of_all_mixtures():
    wanted = np.array([-1, -1, 0, 0, 1, 2, 0])
    share = 3 / 5
    mixed = [2 * (1 - q) * share * q / ((1 - q) * share + q) for q in np.linspace(1e-6, 1, 100001)]
    assert pm.blind_f1(wanted) == pytest.approx(max(mixed), abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_the_best_threshold_against_every_threshold(ties):
    scores = [RNG.normal(size=RNG.integers(1, 6)) for _ in range(40)]
    if ties:
        scores = [np.round(s) for s in scores]
    wanted = np.array([RNG.integers(-1, len(s)) for s in scores])
    threshold, f1 = pm.best_threshold(scores, wanted)

    def at(t):
        return pm.first_error(np.array([pm.first_wrong(s, threshold=t) for s in scores]), wanted).f1

    tried = [0.0, *np.concatenate(scores)]
    assert f1 == pytest.approx(max(map(at, tried)), abs=1e-12)
    assert at(threshold) == pytest.approx(f1, abs=1e-12)
    with pytest.raises(ValueError, match="one kind is here"):
        pm.best_threshold(scores, np.zeros(40, int))


def test_step_accuracy_against_counting():
    claimed, right = RNG.integers(0, 2, 99) == 1, RNG.integers(0, 2, 99)
    found = pm.step_accuracy(claimed, right)
    counts = {(c, z): 0 for c in (True, False) for z in (0, 1)}
    for c, z in zip(claimed.tolist(), right.tolist(), strict=True):
        counts[c, z] += 1
    precision = counts[True, 1] / (counts[True, 1] + counts[True, 0])
    recall = counts[True, 1] / (counts[True, 1] + counts[False, 1])
    f1 = 2 * precision * recall / (precision + recall)
    precision = counts[False, 0] / (counts[False, 0] + counts[False, 1])
    recall = counts[False, 0] / (counts[False, 0] + counts[True, 0])
    negative = 2 * precision * recall / (precision + recall)
    wanted = ((counts[True, 1] + counts[False, 0]) / 99, f1, negative, (f1 + negative) / 2)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_claims_of_one_kind():
    found = pm.step_accuracy(np.ones(4, bool), np.array([1, 1, 0, 1]))
    assert found.accuracy == 0.75 and found.negative_f1 == 0.0
    assert found.f1 == pytest.approx(6 / 7, abs=1e-12)
    assert all(map(math.isnan, pm.step_accuracy(np.zeros(0, bool), np.zeros(0))))
    assert math.isnan(pm.step_accuracy(np.ones(2, bool), np.ones(2)).negative_f1)
