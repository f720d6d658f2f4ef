"""Token and sequence rewards against loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.base import policy_metrics, sequence_rewards, token_rewards
from rlhf_jax.types import CompletionOutput
from tests.algorithms import loops

DATA, _ = loops.batch()
ROWS = loops.rows_of(DATA)
MASK = np.asarray(DATA.rollouts.mask)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_token_rewards_against_a_loop(estimator):
    found = token_rewards(DATA, kl_coef=0.3, estimator=estimator)
    wanted = [loops.token_rewards(row, 0.3, estimator) for row in ROWS]
    np.testing.assert_allclose(found, loops.padded(wanted), rtol=1e-5, atol=1e-6)


def test_token_rewards_keep_fractions_and_add_up():
    found = token_rewards(DATA, kl_coef=0.0)
    present = MASK.any(axis=1)
    totals = sequence_rewards(DATA.scores, DATA.rollouts.mask)
    np.testing.assert_allclose(found.sum(axis=1)[present], totals[present], rtol=1e-5)
    np.testing.assert_array_equal(found[~present], 0)  # a row without tokens has nowhere to put it
    assert (~present).any() and float(found[3, 0]) != round(float(found[3, 0]))


def test_sequence_rewards_against_a_loop():
    found = sequence_rewards(DATA.scores, MASK)
    np.testing.assert_allclose(found, [row.reward for row in ROWS], rtol=1e-6, atol=1e-6)


def test_no_gradient_is_lost_to_padding():
    def total(logprobs):
        moved = dataclasses.replace(DATA, logprobs=logprobs)
        return jnp.sum(token_rewards(moved, kl_coef=0.3, estimator="k3"))

    gradient = np.asarray(jax.grad(total)(DATA.logprobs))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[~MASK], 0)


def test_policy_metrics_by_hand():
    mask = np.array([[1, 1, 0]], bool)
    nan = float("nan")
    output = CompletionOutput(
        logprobs=jnp.zeros((1, 3)), entropy=jnp.array([[1.0, 2.0, nan]]), scores={}
    )
    found = policy_metrics(output, mask, jnp.array([[1.0, math.e, nan]]), mask)
    assert {name: float(mean.count) for name, mean in found.items()} == dict.fromkeys(found, 2.0)
    assert float(found["policy/clip_fraction"].total) == 2.0
    assert float(found["policy/ratio"].total) == pytest.approx(1 + math.e)
    assert float(found["policy/kl_old"].total) == pytest.approx(-1.0)
    assert float(found["policy/entropy"].total) == 3.0
