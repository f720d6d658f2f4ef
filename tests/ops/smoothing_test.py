"""Labels that follow the model, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.preference import bradley_terry
from rlhf_jax.ops.smoothing import pessimistic, smooth_label


def test_a_step_by_hand():
    label, gap = jnp.array([1.0, 0.0, 0.5]), jnp.array([0.0, 0.0, np.log(3.0)])
    np.testing.assert_allclose(smooth_label(label, gap, 0.2), [0.9, 0.1, 0.55], rtol=1e-6)
    np.testing.assert_array_equal(smooth_label(label, gap, 0.0), label)
    np.testing.assert_allclose(smooth_label(label, gap, 1.0), [0.5, 0.5, 0.75], rtol=1e-6)


def test_pessimism_by_hand():
    scores, count = jnp.array([1.0, 1.0, 1.0, 9.0]), jnp.array([1, 4, 100, 0])
    np.testing.assert_allclose(pessimistic(scores, count, coef=2.0), [-1, 0, 0.8, -np.inf])
    np.testing.assert_array_equal(pessimistic(scores[:3], count[:3], coef=0), scores[:3])


ALPHA, BETA, EPOCHS = 1.1e-3, 0.02, 20_000
COUNTS, WINS = np.float32([1, 10, 100, 1000]), 0.731  # sigma(1)


@pytest.fixture(scope="module")
def fixed_point():
    """(d, y) where ascent on the shipped loss and the shipped label step have settled, by count."""
    counts = jnp.asarray(COUNTS)

    def total(scores, label):
        return jnp.sum(counts * bradley_terry(scores[0], scores[1], label=label))

    def epoch(_, carry):
        scores, label = carry
        scores = scores - ALPHA * jax.grad(total)(scores, label)
        return scores, smooth_label(label, scores[0] - scores[1], BETA)

    start = (jnp.zeros((2, 4)), jnp.full(4, WINS))
    scores, label = jax.jit(lambda start: jax.lax.fori_loop(0, EPOCHS, epoch, start))(start)
    return np.asarray(scores[0] - scores[1]), np.asarray(label)


def law(count):
    """The d at which beta d + 2 alpha n sigma(d) = 2 alpha n mu, by bisection."""
    low, high, lead = 0.0, 2.0, 2 * ALPHA * float(count)
    for _ in range(60):
        middle = (low + high) / 2
        left = BETA * middle + lead / (1 + np.exp(-middle))
        low, high = (middle, high) if left < lead * WINS else (low, middle)
    return low


def test_the_conservation_law(fixed_point):
    """To 3 %, as an epoch is no infinitesimal step; what that adds is known and makes it exact."""
    gap, label = fixed_point
    chance = 1 / (1 + np.exp(-gap))
    np.testing.assert_allclose(label, chance, atol=1e-4)
    np.testing.assert_allclose(gap, [law(count) for count in COUNTS], rtol=0.03)
    # The label steps towards the score after its update: beta (sigma(d) - 1/2) more in all.
    lead = 2 * ALPHA * COUNTS
    np.testing.assert_allclose(
        BETA * gap + lead * chance, lead * (WINS + BETA * (chance - 0.5)), rtol=1e-4
    )


def test_often_compared_pairs_are_believed_and_rare_ones_are_not(fixed_point):
    gap, _ = fixed_point
    assert np.all(np.diff(gap) > 0)
    assert gap[0] < 0.03 and gap[-1] == pytest.approx(np.log(WINS / (1 - WINS)), rel=0.1)
