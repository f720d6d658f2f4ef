"""Ensembles under optimisation pressure: best-of-n by scores that were learnt from few preferences.

The world of Coste et al. 2023 (https://arxiv.org/abs/2310.02743) made small. A response is a vector
of 8 numbers, its gold value a tanh network of them. Five members, each the last layer on random
ReLU features of its own, are fitted to the same 400 preferences, a quarter of them flipped. Among
the candidates 1 % lie three times as far out as anything the members saw, and are truly bad.
"""

import functools

import jax
import numpy as np
import pytest

from rlhf_jax.ops.ensemble import combine_members, member_statistics, standardise_members
from rlhf_jax.ops.preference import bradley_terry

WIDTH, HIDDEN, MEMBERS = 8, 64, 5
GOLD_UNITS = 8
PREFERENCES, FLIPPED, RIDGE = 400, 0.25, 0.01
OUTSIDE, BAD = 0.01, -3.0
PROMPTS, SEEDS = 150, 6
COUNTS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)  # n
# In this order the combined scores are made; "single" is the mean over the five members alone.
HOWS = {"mean": 0.0, "worst": 0.0, "uwo": 0.5, "lcb": 1.0}


def fit(features, win):
    """Weights [64] with the least mean Bradley-Terry loss plus ridge, by Newton's method."""
    weights = np.zeros(HIDDEN)
    for _ in range(25):
        chance = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (chance - win) / len(win) + RIDGE * weights
        curved = features.T @ (features * (chance * (1 - chance))[:, None]) / len(win)
        weights -= np.linalg.solve(curved + RIDGE * np.eye(HIDDEN), gradient)
    return weights


def responses(rng, count):
    """Candidates [count 8], and which of them lie far outside."""
    outside = rng.random(count) < OUTSIDE
    drawn = rng.standard_normal((count, WIDTH), np.float32)
    return np.where(outside[:, None], 3 * drawn, drawn), outside


class World:
    """Gold and fitted members of one seed."""

    def __init__(self, seed):
        self.rng = rng = np.random.default_rng(seed)
        inner = rng.normal(size=(WIDTH, GOLD_UNITS)) * WIDTH**-0.5
        outer = rng.normal(size=GOLD_UNITS)
        self._raw = lambda x: np.tanh(x @ inner.astype(x.dtype)) @ outer.astype(x.dtype)
        usual = self._raw(rng.normal(size=(4000, WIDTH)))
        self._mean, self._std = usual.mean(), usual.std()
        first, second = rng.normal(size=(2, PREFERENCES, WIDTH))
        win = self.gold(first) > self.gold(second)
        win = np.where(rng.random(PREFERENCES) < FLIPPED, ~win, win).astype(np.float64)
        self._members = []
        for _ in range(MEMBERS):
            layer = rng.normal(size=(WIDTH, HIDDEN)) * WIDTH**-0.5
            shift = rng.normal(size=HIDDEN)
            gap = features(first, layer, shift) - features(second, layer, shift)
            self._members.append((layer, shift, fit(gap, win)))
        self.pairs = (first, second, win)

    def gold(self, x):
        return (self._raw(x) - self._mean) / self._std

    def scores(self, x):
        """[5 count], as the members say them."""
        said = [features(x, layer, shift) @ w.astype(x.dtype) for layer, shift, w in self._members]
        return np.stack(said).astype(np.float32)


def features(x, layer, shift):
    return np.maximum(x @ layer.astype(x.dtype) + shift.astype(x.dtype), 0) * (2 / HIDDEN) ** 0.5


def best_of(scores, gold):
    """(proxy, gold) of the best of the first n, for every n, as means over prompts."""
    scores, gold = (x.reshape(PROMPTS, COUNTS[-1]) for x in (scores, gold))
    rows = np.arange(PROMPTS)
    picked = [scores[:, :n].argmax(axis=1) for n in COUNTS]
    return np.array([[scores[rows, p].mean(), gold[rows, p].mean()] for p in picked]).T


@functools.cache
def curves():
    """{how: [2, n]}: proxy and gold, means over the seeds."""
    combine = {
        how: jax.jit(functools.partial(combine_members, how=how, coef=c)) for how, c in HOWS.items()
    }
    found = {"single": [], **{how: [] for how in HOWS}}
    for seed in range(SEEDS):
        world = World(seed)
        usual = world.rng.standard_normal((4000, WIDTH), np.float32)
        statistics = member_statistics(world.scores(usual))
        candidates, outside = responses(world.rng, PROMPTS * COUNTS[-1])
        gold = np.where(outside, BAD, world.gold(candidates))
        scores = np.asarray(standardise_members(world.scores(candidates), *statistics))
        found["single"].append(np.mean([best_of(one, gold) for one in scores], axis=0))
        for how, combined in combine.items():
            found[how].append(best_of(np.asarray(combined(scores)), gold))
    return {how: np.mean(seeds, axis=0) for how, seeds in found.items()}


def gold_at(how, n):
    return curves()[how][1][COUNTS.index(n)]


def test_members_are_fitted_to_the_shipped_loss():
    """The Newton fit ends where the gradient of the Bradley-Terry loss and the ridge is 0."""
    first, second, win = (x.astype(np.float32) for x in World(0).pairs)
    layer, shift, weights = (x.astype(np.float32) for x in World(0)._members[0])

    def objective(w):
        a, b = features(first, layer, shift) @ w, features(second, layer, shift) @ w
        return bradley_terry(a, b, label=win).mean() + RIDGE / 2 * (w**2).sum()

    at_zero, at_fit = (jax.grad(objective)(w) for w in (np.zeros_like(weights), weights))
    assert np.abs(at_fit).max() < 1e-5 < 1e-2 < np.abs(at_zero).max()


@pytest.mark.slow
def test_pessimistic_ensembles_hold_out_longer_than_one_model():
    single = gold_at("single", 128)
    assert gold_at("worst", 128) - single > 0.25
    assert gold_at("uwo", 128) > single and gold_at("lcb", 128) > single
    assert gold_at("mean", 128) >= single - 0.02


@pytest.mark.slow
def test_the_proxy_rises_for_ever_while_gold_turns_inside():
    for how in curves():
        assert np.all(np.diff(curves()[how][0]) > 0), how
    assert 0 < np.argmax(curves()["single"][1]) < len(COUNTS) - 1


@pytest.mark.slow
def test_no_ensemble_removes_overoptimisation():
    assert max(gold_at(how, 4096) for how in curves()) < 0
