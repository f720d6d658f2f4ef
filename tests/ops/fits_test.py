"""Fits of gold against distance: curves of known coefficients, noise, and what is refused."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.ops.fits import best_of_n_kl, overoptimisation

D = np.array([0.0, 0.3, 0.7, 1.0, 1.6, 2.4])
CURVES = {
    "best_of_n": lambda d, a, b: d * (a - b * d),
    "rl": lambda d, a, b: d * (a - b * np.log(np.where(d > 0, d, 1.0))),
}


@pytest.mark.parametrize("form", CURVES)
def test_a_curve_of_the_form_is_found_again(form):
    found = overoptimisation(D, CURVES[form](D, 3.0, 1.25), form=form)
    assert (found.alpha, found.beta) == pytest.approx((3.0, 1.25), rel=1e-9)
    assert found.r_squared == pytest.approx(1.0)
    fine = np.linspace(0.01, 10, 200_000)
    highest = fine[CURVES[form](fine, 3.0, 1.25).argmax()]
    assert found.peak == pytest.approx(highest, abs=1e-3)


@pytest.mark.parametrize("form", CURVES)
def test_the_fit_is_the_least_of_squares(form):
    gold = CURVES[form](D, 2.0, 0.5) + np.random.default_rng(0).normal(size=len(D))
    found = overoptimisation(D, gold, form=form)

    def squares(alpha, beta):
        return np.square(gold - CURVES[form](D, alpha, beta)).sum()

    at_fit = squares(found.alpha, found.beta)
    for by in itertools.product((-0.01, 0.01), (-0.01, 0.01)):
        assert squares(found.alpha + by[0], found.beta + by[1]) > at_fit
    assert found.r_squared == pytest.approx(1 - at_fit / np.square(gold - gold.mean()).sum())
    assert found.r_squared < 0.99


def test_gold_that_never_turns_has_no_peak():
    assert overoptimisation(D, 2 * D + D**2, form="best_of_n").peak == math.inf


def test_kl_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(np.array([2, 4])) == pytest.approx([math.log(2) - 0.5, math.log(4) - 0.75])
    # The best of 3 among continuous scores has the density 3 u² over the start's quantiles u.
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    assert best_of_n_kl(3) == pytest.approx(np.mean(3 * u**2 * np.log(3 * u**2)), abs=1e-6)


@pytest.mark.parametrize(
    ("distance", "form", "said"),
    [
        (D, "dpo", "form='dpo'; known: best_of_n, rl"),
        (-D, "rl", "a distance of -2.4; wanted none below 0"),
        (np.array([0.0, 1.0, 2.0]), "rl", "2 different distances above 0; wanted 3"),
    ],
)
def test_what_cannot_be_fitted_is_refused(distance, form, said):
    with pytest.raises(ValueError, match=said):
        overoptimisation(distance, np.ones(len(distance)), form=form)


def test_no_samples_have_no_best():
    with pytest.raises(ValueError, match="best of n=0 samples; wanted 1 or more"):
        best_of_n_kl(np.array([0, 4]))
