"""Losses on scores against float64 loops; symmetries; NaN where nothing is read."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import preference

RNG = np.random.default_rng(0)
CHOSEN, REJECTED = RNG.normal(0, 2, (2, 6)).astype(np.float32)
LABEL = np.array([1.0, 0.0, 0.5, 0.9, 0.3, 1.0], np.float32)
MARGIN = np.array([0.0, 0.5, 1.0, 0.0, 2.0, 0.25], np.float32)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def test_bradley_terry_against_a_loop():
    found = preference.bradley_terry(CHOSEN, REJECTED, label=LABEL, margin=MARGIN)
    for i in range(6):
        d, p, m = float(CHOSEN[i]) - float(REJECTED[i]), float(LABEL[i]), float(MARGIN[i])
        wanted = -(p * log_sigmoid(d - m) + (1 - p) * log_sigmoid(-d - m))
        assert float(found[i]) == pytest.approx(wanted, rel=1e-5)


def test_bradley_terry_reductions():
    plain = preference.bradley_terry(CHOSEN, REJECTED)
    np.testing.assert_allclose(plain, -jax.nn.log_sigmoid(CHOSEN - REJECTED), rtol=1e-6)
    tie = preference.bradley_terry(CHOSEN, CHOSEN, label=LABEL)
    np.testing.assert_allclose(tie, math.log(2), rtol=1e-6)
    there = preference.bradley_terry(CHOSEN, REJECTED, label=LABEL, margin=MARGIN)
    back = preference.bradley_terry(REJECTED, CHOSEN, label=1 - LABEL, margin=MARGIN)
    np.testing.assert_allclose(there, back, rtol=1e-6)


def test_soft_label_is_the_optimum():
    """At label p the loss is least where σ(d) = p, and there its gradient is 0."""
    best = math.log(0.8 / 0.2)
    gradient = jax.grad(
        lambda d: preference.bradley_terry(d, jnp.zeros(1), label=jnp.array([0.8])).sum()
    )
    assert float(gradient(jnp.array([best]))[0]) == pytest.approx(0, abs=1e-6)
    assert float(gradient(jnp.array([best - 0.5]))[0]) < 0 < gradient(jnp.array([best + 0.5]))[0]


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_losses_are_finite_at_the_ends(scale):
    far = jnp.array([scale, -scale])

    def total(x):
        pairs = preference.bradley_terry(x, -x, label=jnp.array([1.0, 1.0]))
        return jnp.sum(pairs) + jnp.sum(preference.correctness(x, jnp.array([0.0, 1.0])))

    value, gradient = jax.value_and_grad(total)(far)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_correctness_against_a_loop():
    found = preference.correctness(CHOSEN, LABEL)
    for i in range(6):
        r, z = float(CHOSEN[i]), float(LABEL[i])
        wanted = -(z * log_sigmoid(r) + (1 - z) * log_sigmoid(-r))
        assert float(found[i]) == pytest.approx(wanted, rel=1e-5)


def steps():
    nan = float("nan")
    ends = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    scores = np.where(ends, RNG.normal(size=ends.shape), nan).astype(np.float32)
    labels = np.where(ends, [[0, 1, 0, 0.25]] * 3, nan).astype(np.float32)
    return scores, labels, ends


def test_step_cross_entropy_against_a_loop():
    scores, labels, ends = steps()
    found = preference.step_cross_entropy(scores, labels, ends)
    for i in range(3):
        losses = []
        for t in range(4):
            if ends[i, t]:
                r, z = float(scores[i, t]), float(labels[i, t])
                losses.append(-(z * log_sigmoid(r) + (1 - z) * log_sigmoid(-r)))
        wanted = sum(losses) / len(losses) if losses else 0.0
        assert float(found[i]) == pytest.approx(wanted, rel=1e-5)


def test_step_gradients_reach_only_step_ends():
    scores, labels, ends = steps()
    gradient = jax.grad(lambda s: preference.step_cross_entropy(s, labels, ends).sum())
    found = np.asarray(gradient(jnp.asarray(scores)))
    np.testing.assert_array_equal(found[~ends], 0)
    assert np.all(found[ends] != 0) and np.all(np.isfinite(found))


def test_one_step_is_correctness():
    label = np.array([0.0, 1.0, 0.5], np.float32)
    alone = preference.correctness(CHOSEN[:3], label)
    as_steps = preference.step_cross_entropy(
        CHOSEN[:3, None], label[:, None], np.ones((3, 1), bool)
    )
    np.testing.assert_allclose(as_steps, alone, rtol=1e-6)


def test_centre_and_dpo_margin_by_hand():
    one, two = jnp.array([1.5]), jnp.array([-1.0])
    assert float(preference.centre(one, two)[0]) == 0.25
    found = preference.dpo_margin(
        jnp.array([-1.0]), jnp.array([-4.0]), jnp.array([-2.0]), jnp.array([-3.0]), beta=0.5
    )
    assert float(found[0]) == 0.5 * ((-1 + 2) - (-4 + 3))
