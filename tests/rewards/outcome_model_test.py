"""The learned outcome reward: the head at the last token, whatever stands after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from rlhf_jax.rewards.base import combine
from rlhf_jax.rewards.outcome_model import outcome_model
from tests.models.batches import drawn
from tests.rewards.examples import random_rollouts

MODEL = decoder(named_size("tiny", layers=1, vocab_size=258, score_heads=("outcome",)))
PARAMS = drawn(MODEL)


def scored(rollouts, **kwargs):
    reward = outcome_model(model=MODEL, params=PARAMS, **kwargs)
    return jax.jit(reward.score)(reward.init(), rollouts)[0]


@jax.jit
def read_last(tokens):
    """The head at the last of some tokens: no padding, no batch, no chunks."""
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = MODEL.apply(PARAMS, tokens, positions, jnp.ones(tokens.shape, bool), None).hidden
    return MODEL.scores(PARAMS, hidden)["outcome"][0, -1]


def alone(rollouts, row):
    prompts, prompt = rollouts.prompts, row // rollouts.group_size
    parts = [prompts.tokens[prompt][prompts.mask[prompt]], rollouts.tokens[row][rollouts.mask[row]]]
    return float(read_last(np.concatenate(parts)[None]))


def test_the_score_is_the_heads_at_the_last_token():
    rollouts = random_rollouts(0)
    scores = scored(rollouts)
    for row in (0, 3, 7):
        np.testing.assert_allclose(scores.outcome[row], alone(rollouts, row), atol=1e-5)
    assert len(set(np.asarray(scores.outcome).tolist())) == 8
    np.testing.assert_array_equal(scores.process, np.zeros(rollouts.mask.shape))
    np.testing.assert_array_equal(scores.parts["outcome_model"], scores.outcome)


def test_a_truncated_completion_is_scored_at_its_last_token():
    rollouts = random_rollouts(0)
    cut = dataclasses.replace(rollouts, truncated=~rollouts.truncated)
    np.testing.assert_array_equal(scored(rollouts).outcome, scored(cut).outcome)


def test_chunks_of_rows_give_the_scores_of_the_whole():
    rollouts = random_rollouts(1)
    np.testing.assert_allclose(
        scored(rollouts, rows=2).outcome, scored(rollouts).outcome, atol=1e-5
    )


def test_parameters_are_state_and_not_constants_of_the_program():
    reward = combine({"orm": (outcome_model(model=MODEL, params=PARAMS), 0.5)})
    score, rollouts = jax.jit(reward.score), random_rollouts(2)
    first, state = score(reward.init(), rollouts)
    other = jax.tree.map(lambda x: x * 1.1, state)
    second, _ = score(other, rollouts)
    assert score._cache_size() == 1
    assert bool(jnp.all(first.outcome != second.outcome))
    np.testing.assert_allclose(first.outcome, 0.5 * first.parts["orm"])


def test_an_unknown_head_is_an_error():
    with pytest.raises(ValueError, match=r"'quality'.*outcome"):
        outcome_model(model=MODEL, params=PARAMS, head="quality")


def test_in_the_space_of_probabilities_the_score_is_the_logits_sigmoid():
    rollouts = random_rollouts(2)
    logits, probs = scored(rollouts).outcome, scored(rollouts, space="prob").outcome
    np.testing.assert_allclose(probs, 1 / (1 + np.exp(-np.asarray(logits))), rtol=1e-6)


def test_an_unknown_space_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"space='logits'; known: \['logit', 'prob'\]"):
        scored(random_rollouts(0), space="logits")
