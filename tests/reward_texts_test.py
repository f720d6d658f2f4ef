"""A policy and reward models with different tokenizers, in one run."""

import json
import logging

import pytest
from ml_collections import ConfigDict

from configs.ppo_tiny import get_config
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.train_policy import train_policy
from rlhf_jax.train_reward import train_reward
from tests.cards import card


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    """A reward model of bytes."""
    root = tmp_path_factory.mktemp("reward")
    data = root / "pairs.jsonl"
    rows = [dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(i)) for i in range(8)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    pairs = dict(
        kind="pairs", name=f"jsonl:{data}", template="{prompt}", max_length=16, rows=4, weight=1.0
    )
    config = ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1),
            model=dict(name="tiny", init_from=""),
            reward=dict(score_heads=("outcome", "process")),
            card=card("pairs"),
            data=dict(tokenizer="byte"),
            sources=dict(pairs=pairs),
            optimizer=dict(learning_rate=1e-2, schedule="constant", warmup=0),
            updates=dict(microbatches=1),
            train=dict(steps=2, max_skipped=1),
            eval=dict(every=100, sources=dict()),
            checkpoint=dict(every=100, keep=1),
            log=dict(every=1),
        )
    )
    train_reward(config, str(root / "run"))
    return root / "run"


def policy_config(reward_run):
    config = get_config()  # characters
    for label in ("outcome", "process"):
        config.rewards[label].init_from = str(reward_run)
    config.value.init_from = "policy"
    config.train.steps = 2
    return config


def test_texts_cross_the_host_and_the_log_says_so(reward_run, tmp_path, caplog):
    config = policy_config(reward_run)
    with caplog.at_level(logging.INFO):
        train_policy(config, str(tmp_path / "run"))
    said = [r.getMessage() for r in caplog.records if "decoded and encoded again" in r.getMessage()]
    assert len(said) == 2
    assert all("byte" in line and "chars:" in line for line in said)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert row["reward/outcome/cut"] == 0
        assert row["reward/outcome"] != 0 and row["reward/process"] != 0
    assert len(lines) == 2


def test_a_value_cannot_read_the_rewards_tokens(reward_run):
    config = policy_config(reward_run)
    config.value.init_from = "outcome"
    with pytest.raises(ValueError, match=r"value\.init_from='outcome' is a reward with another"):
        make_plan(config)


def test_keys_of_a_tokenizer_that_is_not_needed_are_refused():
    config = get_config()
    config.rewards.outcome.template = "{question}"
    with pytest.raises(ValueError, match=r"rewards\.outcome\.template is set, but"):
        make_plan(config)


def test_a_template_of_its_own(reward_run):
    config = policy_config(reward_run)
    config.rewards.outcome.template = "Q: {question}\n"
    writer = make_plan(config).writers["outcome"]
    ids, start = writer.write({"question": "1+2"}, "3", True)
    assert bytes(ids) == b"Q: 1+2\n3" and start == 7
