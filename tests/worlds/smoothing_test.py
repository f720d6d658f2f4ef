"""Iterative data smoothing in a bandit: one pair compared a thousand times, eight pairs once.

The world of Zhu, Jordan and Jiao 2024 (https://arxiv.org/abs/2401.16335, section 4.1). Ten arms of
rewards 1, 0, -1 ... -1. Arm 0 is compared with arm 1 a thousand times, with each other arm once.
Maximum likelihood believes every fluke of a single comparison in the end.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.preference import bradley_terry
from rlhf_jax.ops.smoothing import pessimistic, smooth_label

REWARDS = np.float32([1, 0, *[-1] * 8])
OFTEN, SEEDS, EPOCHS, EVERY = 1000, 40, 20_000, 100
RATE = 5e-4  # of the ascent on the sum over comparisons
BETA, DOUBT = 0.02, 2.0
LOSER = np.arange(1, 10)  # arm 0 stands on the other side of every pair
COUNTS = np.float32([OFTEN, *[1] * 8])


def chance(gap):
    return 1 / (1 + np.exp(-gap))


@functools.cache
def observed():
    """The share of wins of arm 0 over each other arm [40 9]."""
    rng = np.random.default_rng(0)
    return (rng.binomial(COUNTS.astype(int), chance(REWARDS[0] - REWARDS[LOSER]), (SEEDS, 9)) /
            COUNTS).astype(np.float32)  # fmt: skip


def population_loss(scores):
    """The expected cross-entropy of a comparison of two different arms drawn at random."""
    a, b = np.triu_indices(len(REWARDS), 1)
    truth = chance(REWARDS[a] - REWARDS[b])
    return jnp.mean(bradley_terry(scores[a], scores[b], label=truth))


@functools.cache
def fitted(beta):
    """(final scores [40 10], population loss [40 201] every 100 epochs, and after the first)."""

    def train(label):
        def total(scores, label):
            gains = bradley_terry(jnp.broadcast_to(scores[:1], (9,)), scores[1:], label=label)
            return jnp.sum(COUNTS * gains)

        def epoch(carry, _):
            scores, label = carry
            scores = scores - RATE * jax.grad(total)(scores, label)
            return (scores, smooth_label(label, scores[0] - scores[1:], beta)), None

        def block(carry, _):
            carry, _ = jax.lax.scan(epoch, carry, length=EVERY)
            return carry, population_loss(carry[0])

        start = (jnp.zeros(10), label)
        (scores, _), losses = jax.lax.scan(block, start, length=EPOCHS // EVERY)
        first = population_loss(epoch(start, None)[0][0])
        return scores, jnp.concatenate([population_loss(start[0])[None], losses]), first

    return tuple(np.asarray(x) for x in jax.jit(jax.vmap(train))(jnp.asarray(observed())))


def wrong(scores):
    return np.mean(np.argmax(scores, axis=1) != 0)


@pytest.mark.slow
def test_maximum_likelihood_picks_a_fluke_and_smoothing_does_not():
    plain, smooth = fitted(0.0)[0], fitted(BETA)[0]
    counts = np.float32([OFTEN + 8, OFTEN, *[1] * 8])
    doubted = pessimistic(plain, jnp.broadcast_to(counts, plain.shape), coef=DOUBT)
    assert wrong(plain) > 0.4
    # The chance that one of eight rare arms wins its only comparison is 0.64.
    assert wrong(plain) == pytest.approx(1 - (1 - chance(-2.0)) ** 8, abs=0.16)
    assert wrong(smooth) < 0.05
    assert wrong(doubted) < wrong(plain)


@pytest.mark.slow
def test_the_loss_on_the_population_rises_again_only_without_smoothing():
    plain, smooth = (fitted(beta)[1].mean(axis=0) for beta in (0.0, BETA))
    assert np.diff(smooth).max() <= 1e-3
    assert smooth[-1] < smooth[0]
    assert plain[-1] > plain.min() + 0.1


@pytest.mark.slow
def test_stopping_early_is_better_than_going_on():
    assert fitted(0.0)[2].mean() < fitted(0.0)[1][:, -1].mean()
