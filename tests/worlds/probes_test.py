"""Probes find a bias that was planted: reward models of a world where length pays, or does not.

Lambert, Gilbert and Zick 2023 (https://arxiv.org/abs/2310.13595) ask for probes of reward models.
An answer has eight features of quality and a length; people prefer by the quality and, in the
biased world, by b = 1 for every unit of length. Models learn from 6,000 such preferences by the
shipped Bradley-Terry loss, and the probe lengthens answers and changes nothing else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.preference import bradley_terry
from rlhf_jax.ops.probes import pair_slope, within_slope

PAIRS, FEATURES, TEXTS = 6_000, 8, 200
TRUTH = np.float32(np.linspace(-1, 1, FEATURES))
UNIT = 50  # tokens


@functools.cache
def learnt(bias, seed):
    """(weights of features, weight of a unit of length) that preferences teach."""
    rng = np.random.default_rng(seed)
    sides = rng.normal(size=(2, PAIRS, FEATURES)).astype(np.float32)
    lengths = rng.integers(10, 200, (2, PAIRS)) / np.float32(UNIT)
    gold = sides @ TRUTH + bias * lengths
    wins = (rng.random(PAIRS) < 1 / (1 + np.exp(gold[1] - gold[0]))).astype(np.float32)

    def loss(weights):
        scores = sides @ weights[:-1] + weights[-1] * lengths
        return jnp.mean(bradley_terry(scores[0], scores[1], label=wins))

    step = jax.jit(lambda w: w - 0.5 * jax.grad(loss)(w))
    weights = jnp.zeros(FEATURES + 1)
    for _ in range(600):
        weights = step(weights)
    return np.asarray(weights, np.float64)


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_probe_finds_the_planted_length_weight(bias, seed):
    """A-HIST-4: |estimate − b| < 0.1 per unit of length, for b of 0 and 1."""
    weights, rng = learnt(bias, seed), np.random.default_rng(100 + seed)
    quality = rng.normal(size=(TEXTS, FEATURES)) @ weights[:-1]
    tokens = rng.integers(10, 200, TEXTS)[:, None] + np.arange(4) * 10  # closing sentences
    scores = quality[:, None] + weights[-1] * tokens / UNIT
    texts = np.repeat(np.arange(TEXTS), 4)
    found = within_slope(scores.ravel(), tokens.ravel(), texts)
    assert abs(UNIT * found.value - bias) < 0.1
    # Quality falls out whatever it is: the estimate is what the model learnt.
    assert UNIT * found.value == pytest.approx(weights[-1], abs=1e-9)


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_so_do_pairs_that_nobody_changed(bias):
    """The better side by quality alone against the worse one, lengths as they come."""
    weights, rng = learnt(bias, 0), np.random.default_rng(7)
    sides = rng.normal(size=(2, 4 * TEXTS, FEATURES))
    order = np.argsort(-(sides @ TRUTH), axis=0)
    sides = np.take_along_axis(sides, order[:, :, None], axis=0)
    tokens = rng.integers(10, 200, sides.shape[:2])
    scores = sides @ weights[:-1] + weights[-1] * tokens / UNIT
    found = pair_slope(scores[0] - scores[1], tokens[0] - tokens[1], np.arange(4 * TEXTS))
    assert abs(UNIT * found.value - bias) < 0.1
    assert UNIT * found.low < weights[-1] < UNIT * found.high
