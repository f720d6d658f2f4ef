"""Batch metrics: literal numbers, and padding that cannot reach them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.metrics import values
from rlhf_jax.training.monitor import batch_metrics
from rlhf_jax.types import Experience, Scores
from tests.rewards.examples import rollouts_of

# Two groups of two; 3, 1, 2 and 2 tokens; NaN in all padding.
COMPLETIONS = [[5, 6, 7], [5], [6, 7], [8, 9]]
NAN = float("nan")
PROCESS = [[0.5, 0.25, 0.25], [1.0, NAN, NAN], [0.0, 0.0, NAN], [-1.0, 0.5, NAN]]
LOGPROBS = [[-1.0, -2.0, -3.0], [-4.0, NAN, NAN], [-0.5, -0.5, NAN], [-1.0, -1.0, NAN]]
REFERENCE = [[-1.0, -1.0, -3.0], [-5.0, NAN, NAN], [-0.5, -1.0, NAN], [-1.0, -1.0, NAN]]
ENTROPY = [[1.0, 1.0, 1.0], [2.0, NAN, NAN], [0.5, 0.5, NAN], [1.0, 1.0, NAN]]
OUTCOME = [1.0, 0.0, 0.0, 2.0]


@pytest.fixture(scope="module")
def found():
    rollouts = rollouts_of([[1, 2], [3]], COMPLETIONS, group=2)
    fields = {
        "truncated": np.array([True, False, False, False]),
        "logprobs": np.array(LOGPROBS, np.float32) + np.float32(0.25),
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
    entropy = np.array(ENTROPY, np.float32)
    metrics = jax.jit(lambda e, h: batch_metrics(e, h, reference=True))(experience, entropy)
    without = batch_metrics(experience, jnp.asarray(entropy), reference=False)
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
        }
    )


def test_no_divergence_without_a_reference(found):
    assert found[0].keys() - found[1].keys() == {"objective/kl_ref"}
