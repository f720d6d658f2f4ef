"""Reference answers of records: which texts are scored, in whose tokens, and their mean."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.data.sources import open_source
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.reference_answers import Answers, answers_of, check_answers, own_writer, references
from rlhf_jax.rewards.base import device_reward
from rlhf_jax.text.steps import token_tables
from rlhf_jax.text.tokenizer import ByteTokenizer

TEXT = ByteTokenizer()
RECORDS = dict(
    prompt=("a", "far too long a prompt", "ccc", "dd"),
    best=("1", "22", "333", "much longer than six"),
)
DATA = dict(template="{prompt}", max_prompt=6)


def config():
    section = dict(name="length", relative=dict(answers="best"))
    return ConfigDict(
        dict(data=DATA, rollout=dict(max_tokens=6), rewards=dict(size=section, plain=dict()))
    )


def answers(records=RECORDS):
    source = open_source("inline", options=dict(records))
    prompts = PromptSource([source], TEXT, **DATA, seed=3, overlong="skip")
    tables = token_tables(TEXT)
    writer = own_writer(config(), TEXT, tables)
    return Answers("best", prompts, writer, rows=2)


def scored(asked, reward):
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    return references("size", asked, mesh, ShardingRules())(reward, {})


def test_each_records_answer_is_scored_where_it_is_drawn():
    """By a reward that says prompt, tokens and whether the end was cut off."""

    def say(rollouts):
        prompt = rollouts.prompts.mask.sum(-1)
        return 100 * prompt + 10 * rollouts.mask.sum(-1) + rollouts.truncated

    asked = answers()
    assert asked.records == 4
    found = scored(asked, device_reward("say", say))
    # With end-of-text; the second prompt is overlong and never drawn, the last answer is cut.
    np.testing.assert_array_equal(found, [120, 0, 340, 261])


def test_several_answers_count_by_their_mean():
    asked = answers(dict(prompt=("a", "b"), best=(["1", "333"], ["22", "22", "55555"])))
    size = device_reward("size", lambda rollouts: rollouts.mask.sum(-1))
    np.testing.assert_allclose(scored(asked, size), [3, 4])


def test_a_score_that_is_no_number_is_an_error():
    lost = device_reward("lost", lambda rollouts: np.nan * rollouts.mask.sum(-1))
    with pytest.raises(ValueError, match=r"rewards.size.relative: .* is nan; 3 records"):
        scored(answers(), lost)


def test_records_without_answers_are_named():
    check_answers(config(), answers().prompts)
    with pytest.raises(ValueError, match=r"rewards.size.relative.answers.*no field 'best'"):
        check_answers(config(), answers(dict(prompt=("a",))).prompts)
    for odd in ([], [1], 2):
        with pytest.raises(ValueError, match="wanted the text of an answer"):
            answers_of({"best": odd}, "best")
