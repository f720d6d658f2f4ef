"""Step rewards that telescope: literal steps, a slow reference, and policies that pad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from rlhf_jax.rewards.process_model import TRANSFORMS, delta, process_model
from tests.models.batches import drawn
from tests.rewards.examples import random_rollouts

MODEL = decoder(
    named_size("tiny", layers=1, vocab_size=258, score_heads=("process",), lm_head=False)
)
PARAMS = drawn(MODEL)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def scored(rollouts, **kwargs):
    reward = process_model(model=MODEL, params=PARAMS, **kwargs)
    return jax.jit(reward.score)(reward.init(), rollouts)[0]


def steps(rows, width=12):
    """Rows of step logits -> (logits [B T], ends [B T]); a step ends every second column."""
    logits = np.full((len(rows), width), np.nan, np.float32)
    ends = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        for s, logit in enumerate(row):
            logits[i, 2 * s + 1], ends[i, 2 * s + 1] = logit, True
    return logits, ends


def slow_delta(logits, ends, group):
    """The same, one step after another."""
    paid = np.zeros(logits.shape)
    for first in range(0, len(logits), group):
        members = range(first, first + group)
        starts = [sigmoid(logits[i][ends[i]][0]) for i in members if ends[i].any()]
        for i in members:
            before = np.mean(starts) if starts else 0.0
            for t in np.flatnonzero(ends[i]):
                paid[i, t] = sigmoid(logits[i, t]) - before
                before = sigmoid(logits[i, t])
    return paid


def test_delta_literal():
    logits, ends = steps([[0.0, np.log(3.0)], [np.log(3.0)]], width=4)  # σ: 1/2, 3/4 and 3/4
    paid = delta(logits, ends, 2)
    np.testing.assert_allclose(
        paid, [[0, 0.5 - 0.625, 0, 0.25], [0, 0.75 - 0.625, 0, 0]], atol=1e-6
    )


def test_delta_is_the_slow_reference_on_random_steps():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(12, 9)).astype(np.float32) * 3
    ends = rng.random((12, 9)) < 0.4
    ends[5] = False  # a row without a step
    paid = delta(np.where(ends, logits, np.nan), ends, 4)
    np.testing.assert_allclose(paid, slow_delta(logits, ends, 4), atol=1e-6)
    assert np.abs(np.asarray(paid)).sum() > 1


def test_the_sum_depends_on_where_a_solution_ends_and_not_on_the_steps():
    logits, ends = steps([[0.3, 2.0], [0.3, -1.0, 4.0, -2.0, 2.0]])
    total = np.asarray(delta(logits, ends, 2)).sum(1)
    np.testing.assert_allclose(total, sigmoid(2.0) - sigmoid(0.3), atol=1e-6)


def gain_of_padding(transform, short, padded):
    """By how much a row gains over the others of its group by more steps."""
    logits, ends = steps([short, padded, short, short], width=40)
    total = np.asarray(TRANSFORMS[transform](logits, ends, 4)).sum(1)
    return total[1] - total[0]


def test_repeating_a_correct_trivial_step_gains_nothing():
    solution = [1.0, 0.5, 2.0]
    for repeats in (1, 5, 15):
        before = [1.0] + [4.0] * repeats + [0.5, 2.0]
        np.testing.assert_allclose(gain_of_padding("delta", solution, before), 0, atol=1e-6)
        first = [4.0] * repeats + solution  # shares the group's start with the others
        np.testing.assert_allclose(gain_of_padding("delta", solution, first), 0, atol=1e-6)
    # After the answer the last step decides, once: fifteen repeats gain what one gains.
    gains = [gain_of_padding("delta", solution, [*solution, *[4.0] * n]) for n in (1, 15)]
    np.testing.assert_allclose(gains[0], gains[1], atol=1e-6)
    # The plain form does pay: the hazard is real, and this test would see it.
    assert gain_of_padding("prob", solution, [1.0, *[4.0] * 15, 0.5, 2.0]) > 10
    assert gain_of_padding("prob_per_step", solution, [1.0, *[4.0] * 15, 0.5, 2.0]) < 1


def test_a_group_that_pads_throughout_gains_nothing_either():
    """The group's start moves with its members: opening with a sure step pays less, not more."""

    def mean(rows):
        return float(np.asarray(delta(*steps(rows, width=40), 2)).sum(1).mean())

    honest = mean([[1.0, 2.0], [0.5, 2.0]])
    assert mean([[4.0, 1.0, 2.0], [4.0, 0.5, 2.0]]) <= honest
    assert mean([[4.0] * 10 + [1.0, 2.0], [4.0] * 10 + [0.5, 2.0]]) <= honest


def test_other_transforms_literal():
    logits, ends = steps([[0.0, np.log(3.0)]], width=4)
    wanted = {
        "prob": [0, 0.5, 0, 0.75],
        "prob_per_step": [0, 0.25, 0, 0.375],
        "centred": [0, 0, 0, 0.25],
        "logit": [0, 0, 0, np.log(3.0)],
    }
    for name, row in wanted.items():
        np.testing.assert_allclose(TRANSFORMS[name](logits, ends, 1), [row], atol=1e-6)
    assert sorted(TRANSFORMS) == sorted([*wanted, "delta"])


def test_scores_are_read_at_step_ends_and_chunks_change_nothing():
    rollouts = random_rollouts(0)
    evaluate = jax.jit(
        lambda rollouts: evaluate_completions(
            MODEL, PARAMS, {}, rollouts, temperature=1.0, rows=None
        )
    )
    read = evaluate(rollouts).scores["process"]
    logits = scored(rollouts, transform="logit")
    wanted = np.where(rollouts.step_ends, read, 0)
    np.testing.assert_allclose(logits.process, wanted, atol=1e-6)
    np.testing.assert_array_equal(logits.outcome, np.zeros(8))
    one, two = scored(rollouts), scored(rollouts, rows=4)
    np.testing.assert_allclose(one.process, two.process, atol=1e-6)
    np.testing.assert_allclose(one.parts["process_model"], one.process.sum(1), atol=1e-6)


def test_a_truncated_completion_is_scored_at_its_last_token():
    rollouts = random_rollouts(1)
    cut = dataclasses.replace(rollouts, truncated=~rollouts.truncated)
    last = rollouts.mask.sum(1) - 1
    assert bool(jnp.all(scored(cut, transform="prob").process[np.arange(8), last] > 0))


def test_bad_values_are_errors():
    with pytest.raises(ValueError, match=r"'outcome'.*process"):
        process_model(model=MODEL, params=PARAMS, head="outcome")
    with pytest.raises(ValueError, match=r"'sum'.*delta"):
        process_model(model=MODEL, params=PARAMS, transform="sum")
