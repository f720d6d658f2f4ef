"""Token and sequence rewards against loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.base import policy_metrics, sequence_rewards, token_rewards
from rlhf_jax.types import CompletionOutput, Experience, Prompts, Rollouts, Scores

NAN = float("nan")
MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)


def experience(seed=0):
    """Four rows in groups of two: full, length 1, empty, length 2; NaN in all padding."""
    rng = np.random.default_rng(seed)

    def floats():
        return jnp.asarray(np.where(MASK, rng.normal(size=MASK.shape), NAN), jnp.float32)

    prompts = Prompts(
        tokens=jnp.zeros((2, 1), jnp.int32),
        mask=jnp.ones((2, 1), bool),
        **{name: jnp.zeros(2, jnp.int32) for name in ("record", "source", "draw")},
    )
    rollouts = Rollouts(
        prompts=prompts,
        tokens=jnp.zeros(MASK.shape, jnp.int32),
        mask=jnp.asarray(MASK),
        step_ends=jnp.zeros(MASK.shape, bool),
        logprobs=floats(),
        behaviour_logprobs=floats(),
        truncated=jnp.zeros(4, bool),
        sample=jnp.array([0, 1, 0, 1]),
        version=jnp.zeros(4, jnp.int32),
    )
    scores = Scores(outcome=jnp.array([0.7, -0.25, 3.0, 0.1]), process=floats(), parts={})
    return Experience(
        rollouts=rollouts,
        scores=scores,
        logprobs=floats(),
        ref_logprobs=floats(),
        values=floats(),
        extra={},
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards_against_a_loop(estimator):
    data = experience()
    found = np.asarray(token_rewards(data, kl_coef=0.3, estimator=estimator))
    for row, t in np.ndindex(*MASK.shape):
        wanted = 0.0
        if MASK[row, t]:
            delta = float(data.logprobs[row, t]) - float(data.ref_logprobs[row, t])
            kl = {"k1": delta, "k2": delta**2 / 2, "k3": math.exp(-delta) - 1 + delta}
            wanted = float(data.scores.process[row, t]) - 0.3 * kl[estimator]
            if not MASK[row, t + 1 :].any():
                wanted += float(data.scores.outcome[row])
        assert found[row, t] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_token_rewards_keep_fractions_and_add_up():
    data = experience()
    found = token_rewards(data, kl_coef=0.0)
    wanted = sequence_rewards(data.scores, data.rollouts.mask)
    present = MASK.any(axis=1)
    np.testing.assert_allclose(found.sum(axis=1)[present], wanted[present], rtol=1e-6)
    np.testing.assert_array_equal(found[2], 0)  # the row without tokens has nowhere to put it
    assert float(found[1, 0]) != round(float(found[1, 0]))


def test_sequence_rewards_against_a_loop():
    scores = experience().scores
    found = sequence_rewards(scores, MASK)
    for row in range(4):
        process = sum(float(scores.process[row, t]) for t in range(3) if MASK[row, t])
        assert float(found[row]) == pytest.approx(float(scores.outcome[row]) + process, rel=1e-6)


def test_no_gradient_is_lost_to_padding():
    data = experience()

    def total(logprobs):
        moved = dataclasses.replace(data, logprobs=logprobs)
        return jnp.sum(token_rewards(moved, kl_coef=0.3, estimator="k3"))

    gradient = np.asarray(jax.grad(total)(data.logprobs))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[~MASK], 0)


def test_policy_metrics_by_hand():
    mask = np.array([[1, 1, 0]], bool)
    output = CompletionOutput(
        logprobs=jnp.zeros((1, 3)), entropy=jnp.array([[1.0, 2.0, NAN]]), scores={}
    )
    found = policy_metrics(output, mask, jnp.array([[1.0, math.e, NAN]]), mask)
    assert {name: float(mean.count) for name, mean in found.items()} == dict.fromkeys(found, 2.0)
    assert float(found["policy/clip_fraction"].total) == 2.0
    assert float(found["policy/ratio"].total) == pytest.approx(1 + math.e)
    assert float(found["policy/kl_old"].total) == pytest.approx(-1.0)
    assert float(found["policy/entropy"].total) == 3.0
