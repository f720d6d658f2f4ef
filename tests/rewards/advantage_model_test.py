"""The advantage reward: one head at the completion's end, less another at the prompt's end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.completions import evaluate_texts, text_scores
from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from rlhf_jax.rewards.advantage_model import advantage_model
from rlhf_jax.types import Texts
from tests.models.batches import drawn
from tests.rewards.examples import random_rollouts

HEADS = ("outcome", "expected")
MODEL = decoder(named_size("tiny", layers=1, vocab_size=258, lm_head=False, score_heads=HEADS))
PARAMS = drawn(MODEL)
# A fresh head expects nothing of anything.
KERNEL = jax.random.normal(jax.random.key(1), PARAMS["heads"]["expected"]["kernel"].shape)
PARAMS["heads"]["expected"] = {"kernel": KERNEL, "bias": jnp.asarray(0.5)}


def scored(rollouts, **kwargs):
    reward = advantage_model(model=MODEL, params=PARAMS, **kwargs)
    return jax.jit(reward.score)(reward.init(), rollouts)[0]


def as_texts(rollouts):
    """The same rows as training has them: without padding between prompt and completion."""
    group, prompts = rollouts.group_size, rollouts.prompts
    rows = []
    for row in range(len(rollouts.tokens)):
        asked = prompts.tokens[row // group][prompts.mask[row // group]]
        rows.append((asked, rollouts.tokens[row][rollouts.mask[row]]))
    width = max(len(a) + len(b) for a, b in rows)
    tokens, mask, trains = (np.zeros((len(rows), width), kind) for kind in (np.int32, bool, bool))
    for row, (asked, answer) in enumerate(rows):
        end = len(asked) + len(answer)
        tokens[row, :end], mask[row, :end] = np.concatenate([asked, answer]), True
        trains[row, len(asked) : end] = True
    return Texts(tokens=tokens, mask=mask, loss_mask=trains, segment=mask.astype(np.int32))


def test_the_score_is_what_training_calls_the_advantage():
    rollouts = random_rollouts(0)
    found, texts = scored(rollouts), as_texts(rollouts)
    said = jax.jit(lambda t: evaluate_texts(MODEL, PARAMS, {}, t).scores)(texts)
    np.testing.assert_allclose(found.outcome, text_scores(said, texts, "outcome"), atol=1e-5)
    np.testing.assert_array_equal(found.parts["advantage_model"], found.outcome)
    prompts = np.asarray([t.nonzero()[0][0] - 1 for t in texts.loss_mask])
    expected = np.asarray(said["expected"])[np.arange(len(prompts)), prompts]
    np.testing.assert_allclose(found.parts["advantage_model/expected"], expected, atol=1e-5)
    assert np.abs(expected).min() > 1e-3  # so that its being taken off is seen


def test_what_is_expected_is_the_same_for_all_answers_to_a_prompt():
    rollouts = random_rollouts(0)
    by_prompt = np.asarray(scored(rollouts).parts["advantage_model/expected"])
    by_prompt = by_prompt.reshape(-1, rollouts.group_size)
    np.testing.assert_array_equal(by_prompt, np.repeat(by_prompt[:, :1], rollouts.group_size, 1))
    assert len(set(by_prompt[:, 0].tolist())) == len(by_prompt)


@pytest.mark.slow
def test_an_ensembles_advantage_is_the_mean_of_its_members():
    config = dataclasses.replace(MODEL.config, members=2, ensemble="linear")
    model, rollouts = decoder(config), random_rollouts(0)
    params = model.init(jax.random.key(2))
    kernel = jnp.stack([KERNEL, -2 * KERNEL])
    params["heads"]["expected"] = {"kernel": kernel, "bias": jnp.asarray([0.5, 1.0])}
    reward = advantage_model(model=model, params=params)
    found = jax.jit(reward.score)(reward.init(), rollouts)[0]
    texts = as_texts(rollouts)
    said = jax.jit(lambda t: evaluate_texts(model, params, {}, t).scores)(texts)
    members = [
        text_scores({name: said[f"{name}/{e}"] for name in HEADS}, texts, "outcome")
        for e in range(2)
    ]
    np.testing.assert_allclose(found.outcome, np.mean(members, axis=0), atol=1e-5)
    assert np.abs(members[0] - members[1]).max() > 0.1


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (dict(head="quality"), r"head='quality', but the model has \('outcome', 'expected'\)"),
        (dict(expected="outcome"), "expected='outcome'; of these heads only value, expected"),
        (dict(head="expected"), "head='expected'"),
    ],
)
def test_heads_that_cannot_be_are_named(heads, words):
    with pytest.raises(ValueError, match=words):
        advantage_model(model=MODEL, params=PARAMS, **heads)
