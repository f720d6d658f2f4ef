"""Batch metrics: literal numbers, and padding that cannot reach them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.metrics import values
from rlhf_jax.training.monitor import batch_metrics, signal_metrics
from rlhf_jax.types import Experience, Scores
from tests.rewards.examples import rollouts_of

# Two groups of two; 3, 1, 2 and 2 tokens; NaN in all padding.
COMPLETIONS = [[5, 6, 7], [5], [6, 7], [8, 9]]
NAN = float("nan")
PROCESS = [[0.5, 0.25, 0.25], [1.0, NAN, NAN], [0.0, 0.0, NAN], [-1.0, 0.5, NAN]]
LOGPROBS = [[-1.0, -2.0, -3.0], [-4.0, NAN, NAN], [-0.5, -0.5, NAN], [-1.0, -1.0, NAN]]
BEHAVIOUR = [[-1.0, -1.5, -3.0], [-4.0, NAN, NAN], [-2.0, -0.5, NAN], [-1.0, -0.5, NAN]]
REFERENCE = [[-1.0, -1.0, -3.0], [-5.0, NAN, NAN], [-0.5, -1.0, NAN], [-1.0, -1.0, NAN]]
ENTROPY = [[1.0, 1.0, 1.0], [2.0, NAN, NAN], [0.5, 0.5, NAN], [1.0, 1.0, NAN]]
OUTCOME = [1.0, 0.0, 0.0, 2.0]


@pytest.fixture(scope="module")
def found():
    rollouts = rollouts_of([[1, 2], [3]], COMPLETIONS, group=2)
    fields = {
        "truncated": np.array([True, False, False, False]),
        "logprobs": np.array(LOGPROBS, np.float32) + np.float32(0.25),
        "behaviour_logprobs": np.array(BEHAVIOUR, np.float32),
        "version": np.array([7, 7, 4, 4], np.int32),
        "step_ends": np.ones(rollouts.mask.shape, bool),  # true in padding too
    }
    experience = Experience(
        rollouts=type(rollouts)(**{**vars(rollouts), **fields}),
        scores=Scores(
            outcome=np.array(OUTCOME, np.float32),
            process=np.array(PROCESS, np.float32),
            parts={"a": np.array(OUTCOME, np.float32) * 10},
        ),
        logprobs=np.array(LOGPROBS, np.float32),
        ref_logprobs=np.array(REFERENCE, np.float32),
        values=np.zeros((4, 3), np.float32),
        extra={},
    )
    entropy, step = np.array(ENTROPY, np.float32), np.asarray(7, np.int32)
    metrics = jax.jit(lambda *given: batch_metrics(*given, reference=True))(
        experience, entropy, step
    )
    without = batch_metrics(experience, jnp.asarray(entropy), step, reference=False)
    return values(metrics), values(without)


def test_literal_numbers(found):
    got = {name: float(number) for name, number in found[0].items()}
    assert got == pytest.approx(
        {
            "objective/score": (2.0 + 1.0 + 0.0 + 1.5) / 4,  # outcome + process, per sequence
            "objective/kl_ref": (-1.0 + 1.0 + 0.5 + 0.0) / 4,  # sum of log-ratios, per sequence
            "reward/a": 7.5,
            "rollout/length": 8 / 4,
            "rollout/steps": 8 / 4,
            "rollout/truncated": 0.25,
            "rollout/entropy": (3.0 + 2.0 + 1.0 + 2.0) / 8,  # per token
            "policy/sampler_gap": 0.25,
            # log w: 0, -0.5, 0; 0; 1.5, 0; 0, -0.5
            "policy/kl_rollout": (0.5 - 1.5 + 0.5) / 8,  # per token
            "policy/max_log_weight": 1.5,
            "rollout/staleness": 1.5,  # policy steps
        }
    )


def test_no_divergence_without_a_reference(found):
    assert found[0].keys() - found[1].keys() == {"objective/kl_ref"}


def test_a_batch_of_padding_is_never_stale_by_a_number_that_is_none():
    """No token at all: what has nothing to average is empty, and the largest weight is 1."""
    rollouts = rollouts_of([[1]], [[5], [5]], group=2)
    empty = np.zeros((2, 1), bool)
    nan = np.full((2, 1), NAN, np.float32)
    rollouts = dataclasses.replace(rollouts, mask=empty, behaviour_logprobs=nan)
    zeros = np.zeros(2, np.float32)
    experience = Experience(
        rollouts=rollouts,
        scores=Scores(outcome=zeros, process=nan, parts={}),
        logprobs=nan,
        ref_logprobs=nan,
        values=nan,
        extra={},
    )
    metrics = batch_metrics(experience, nan, np.asarray(3, np.int32), reference=False)
    assert float(metrics["policy/max_log_weight"].total) == 0.0
    assert float(metrics["policy/kl_rollout"].count) == 0.0
    assert float(values(metrics)["rollout/staleness"]) == 3.0


def test_groups_without_signal_are_counted():
    outcome = np.array([1, 1, 1, 0, 0.5, 0.5, 2, 2], np.float32)
    process = np.zeros((8, 2), np.float32)
    process[4] = [0.25, 0.25]  # tells two equal outcomes apart
    scores = Scores(outcome=outcome, process=process, parts={})
    found = signal_metrics(scores, 2)["rollout/groups_without_signal"]
    assert (float(found.total), float(found.count)) == (2.0, 4.0)
    assert float(values(signal_metrics(scores, 4))["rollout/groups_without_signal"]) == 0.0
    assert signal_metrics(scores, 1) == {}
