"""Runs that could not do what their config says are refused by the plan, before anything loads."""

import jax
import pytest
from ml_collections import ConfigDict

from configs.ppo_tiny import get_config
from rlhf_jax import policy_run
from rlhf_jax.models.transformer import decoder
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.reward_checks import check_made
from rlhf_jax.text.tokenizer import ByteTokenizer
from tests.generative_run_test import small_config


@pytest.mark.parametrize(
    ("label", "change", "message"),
    [
        ("outcome", dict(space="odds"), r"rewards.outcome: outcome_model: space='odds'; known"),
        ("process", dict(transform="sum"), r"rewards.process: process_model: transform='sum'"),
        (
            "outcome",
            dict(name="ensemble", init_from="", how="vote"),
            r"rewards.outcome.init_from='' is one model",
        ),
        (
            "outcome",
            dict(name="advantage_model", expected="process"),
            r"rewards.outcome: advantage_model: head='outcome', expected='process'",
        ),
        ("outcome", dict(shrink=1.5), r"rewards.outcome.shrink: shrink: negative=1.5"),
        ("length", dict(target=0, per_token=0.0, free=0), r"rewards.length: .*target=0"),
        ("exact", dict(name="missing_eos", penalty=1.0), r"rewards.exact: .*penalty=1.0"),
        ("exact", dict(name="overlong", limit=8, buffer=20), r"rewards.exact: .*buffer=20"),
    ],
)
def test_a_value_that_the_factory_refuses(label, change, message):
    config = get_config()
    config.rewards[label] = ConfigDict(config.rewards[label].to_dict() | change)
    with pytest.raises(ValueError, match=message):
        make_plan(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(yes="12"), r"rewards.judge: yes='12' is 2 tokens .*; set yes to a text that is one"),
        (dict(no="+"), r"rewards.judge: yes='\+' and no='\+' are the same token"),
        (dict(question=""), r"rewards.judge: question='' has no tokens"),
        (dict(space="odds"), r"generative_model: space='odds'; known"),
        (dict(head="outcome"), r"rewards.judge.head: no such key"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_plan(small_config(**change))


def test_positions_count_the_question():
    config = small_config()
    config.model.update(positions="learned", max_positions=56)  # 24 + 32 and no question
    with pytest.raises(ValueError, match=r"rewards.judge.question: rows of 59 tokens"):
        make_plan(config)


def test_the_question_is_read_in_the_rewards_own_tokens():
    plan = make_plan(small_config(yes="+", no="-"))
    config = small_config(yes="é", no="-")  # two bytes
    with pytest.raises(ValueError, match=r"rewards.judge: yes='é' is 2 tokens"):
        check_made(config, "judge", ByteTokenizer(), decoder(plan.described["reward/judge"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.max_draws": 10}, r"rollout.max_draws=10, but ppo leaves out no groups"),
        (
            {"model.score_heads": ("value",)},
            r"value.init_from='outcome', but model.score_heads puts the critic on the policy's",
        ),
        (
            {"controllers": dict(reference=dict(every=13))},
            r"controllers.reference.every=13, but the policy has 12 steps",
        ),
        (
            {
                "controllers": dict(reference=dict(every=10)),
                "value.pretrain": dict(steps=4),
                "monitor": dict(proxy="outcome", every=9),
            },
            r"controllers.reference.every=10, but the policy has 8 steps",
        ),
        (
            {"value.pretrain": dict(steps=4), "monitor": dict(proxy="outcome", every=9)},
            r"monitor.every=9 is more than the policy's 8 steps",
        ),
        (
            {
                "model.positions": "learned",
                "model.max_positions": 60,
                "algorithm.rehearsal": dict(weight=0.1),
                "extra.rehearsal": dict(
                    kind="texts", name="arithmetic", split="train", data_dir="", options={},
                    template="{question}", max_length=61, rows=8,
                ),
            },
            r"extra.rehearsal.max_length: rows of 61 tokens",
        ),
    ],
)  # fmt: skip
def test_what_would_not_do_what_it_says(changes, message):
    config = get_config()
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[key] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        make_plan(config)


def test_sampling_without_a_temperature_is_at_1():
    config = small_config()
    del config.rollout.sampling.temperature
    plan = make_plan(config)
    assert float(plan.sampling.temperature) == 1.0
    with jax.set_mesh(plan.mesh):
        run, _ = policy_run.start(plan)
    assert run.steps.update is not None
