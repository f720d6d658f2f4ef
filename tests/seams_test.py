"""What later steps bring must fit: toys pass through the unchanged `train_policy`, and learn.

Each toy is a file of at most 40 lines in tests/toys, named in the config by its dotted name. The
task is to write one token, whose share among the sampled tokens is the reward; chance is 1/19.
"""

import json
import pathlib

import pytest

from configs.ppo_tiny import get_config
from rlhf_jax import policy_run
from rlhf_jax.train_policy import train_policy

TOKEN = 5
STEPS = 24


def toy_config(algorithm, **rewards):
    """ppo_tiny on the toy task: short completions, one layer, a quick optimizer."""
    config = get_config()
    config.model = dict(name="tiny", init_from="", layers=1, remat="none")
    config.algorithm = algorithm
    config.rewards = rewards or {"likes": dict(name="tests.toys.likes", weight=1.0, token=TOKEN)}
    config.value.init_from = "policy"
    config.rollout.prompts, config.rollout.samples, config.rollout.max_tokens = 8, 4, 8
    config.updates.minibatches = 1
    config.train.steps = STEPS
    config.log.every, config.log.samples_every = 1, 1000
    config.checkpoint.every = 1000
    for role in ("policy", "value"):
        config.optimizer[role].learning_rate = 5e-3
    return config


def run(config, workdir, monkeypatch):
    """Trains; returns the score per step. Asserts that every step was compiled once."""
    started = []
    start = policy_run.start

    def remember(plan):
        made, state = start(plan)
        started.append(made)
        return made, state

    monkeypatch.setattr(policy_run, "start", remember)
    train_policy(config, str(workdir))
    compiled = {
        name: step._cache_size()
        for name, step in started[0].steps._asdict().items()
        if hasattr(step, "_cache_size") and step._cache_size()
    }
    assert compiled.keys() >= {"generate", "evaluate", "update"}
    assert set(compiled.values()) == {1}, compiled
    rows = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


def assert_learnt(rows, name="reward/likes"):
    scores = [row[name] for row in rows]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert last > first + 0.25, scores


@pytest.mark.parametrize(
    "algorithm",
    [
        dict(name="ppo", kl_coef=0.0),  # a separate critic: a tree and an optimizer of its own
        dict(name="grpo"),
        dict(name="tests.toys.superhf"),
        dict(name="tests.toys.online_dpo"),
    ],
    ids=lambda algorithm: algorithm["name"].rpartition(".")[2],
)
def test_an_algorithm_is_one_file(algorithm, tmp_path, monkeypatch):
    assert_learnt(run(toy_config(algorithm), tmp_path, monkeypatch))


def test_dynamic_sampling_refills_groups(tmp_path, monkeypatch):
    config = toy_config(dict(name="tests.toys.dynamic"))
    config.rollout.max_draws = 3
    assert_learnt(run(config, tmp_path, monkeypatch))


def test_an_online_reward_learns_beside_the_policy(tmp_path, monkeypatch):
    likes = dict(name="tests.toys.likes", weight=1.0, token=TOKEN)
    implicit = dict(name="tests.toys.implicit", weight=0.1, init_from="")
    config = toy_config(dict(name="tests.toys.prime"), likes=likes, implicit=implicit)
    rows = run(config, tmp_path, monkeypatch)
    assert_learnt(rows)
    losses = [row["implicit/reward/implicit_loss"] for row in rows]
    assert losses[-1] < losses[0]


def test_rehearsal_rows_train_beside_the_policy(tmp_path, monkeypatch):
    config = toy_config(dict(name="tests.toys.rehearsal", weight=0.05))
    section = dict(kind="texts", max_length=64, rows=8, weight=1.0)
    config.extra = {"rehearsal": {**config.data.to_dict(), **section}}
    rows = run(config, tmp_path, monkeypatch)
    assert_learnt(rows)
    losses = [row["loss/rehearsal"] for row in rows]
    assert losses[-1] < losses[0]


def test_roles_are_adapters_on_one_frozen_base(tmp_path, monkeypatch):
    config = toy_config(dict(name="ppo", kl_coef=0.001))
    config.model.lora_rank = 4
    for role in ("policy", "value"):
        config.optimizer[role].learning_rate = 2e-2
    assert_learnt(run(config, tmp_path, monkeypatch))


def test_a_value_head_on_the_policy_trunk(tmp_path, monkeypatch):
    config = toy_config(dict(name="ppo", kl_coef=0.0, value_coef=0.1))
    config.model.score_heads = ("value",)
    assert_learnt(run(config, tmp_path, monkeypatch))
