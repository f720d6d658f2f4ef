"""What later steps bring must fit: toys pass through the unchanged `train_policy`, and learn.

Each toy is a file of at most 40 lines in tests/toys, named in the config by its dotted name. The
task is to write one token, whose share among the sampled tokens is the reward; chance is 1/19.
"""

import json
import math
import pathlib

import jax
import pytest

from configs.ppo_tiny import get_config
from rlhf_jax.train_policy import train_policy
from tests import compiling

TOKEN = 5
STEPS = 20


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
    """Trains; returns the metrics per step and the last state. Every step is compiled once."""
    started = compiling.remember_runs(monkeypatch)
    state = train_policy(config, str(workdir))
    compiled = compiling.times_compiled(started[0])
    assert compiled.keys() >= {"generate", "evaluate", "update"}
    assert set(compiled.values()) == {1}, compiled
    rows = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows], state


def leaf_names(tree):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return {path[-1].key for path in paths}


def assert_learnt(rows, name="reward/likes"):
    scores = [row[name] for row in rows]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert last > first + 0.25, scores


def test_toys_are_short():
    for path in pathlib.Path(__file__).with_name("toys").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name


@pytest.mark.parametrize(
    "algorithm",
    [
        dict(name="ppo", kl_coef=0.0),  # a separate critic: a tree and an optimizer of its own
        pytest.param(dict(name="rloo", kl_coef=0.0), marks=pytest.mark.slow),
        dict(name="superhf", kl_coef=0.01),
        pytest.param(dict(name="online_dpo"), marks=pytest.mark.slow),
        pytest.param(dict(name="best_of_n"), marks=pytest.mark.slow),
        pytest.param(
            dict(name="expert_iteration", reward="likes", threshold=0.15), marks=pytest.mark.slow
        ),
    ],
    ids=lambda algorithm: algorithm["name"].rpartition(".")[2],
)
def test_an_algorithm_is_one_file(algorithm, tmp_path, monkeypatch):
    rows, state = run(toy_config(algorithm), tmp_path, monkeypatch)
    assert_learnt(rows)
    critic = {"value"} if algorithm["name"] == "ppo" else set()
    assert state.train.params.keys() == state.train.opt_state.keys() == {"policy"} | critic


def test_dynamic_sampling_refills_groups(tmp_path, monkeypatch):
    wrappers = dict(correction=dict(how="tis"), select=dict(how="signal", reward="likes"))
    config = toy_config(dict(name="dapo") | wrappers)
    config.rollout.max_draws = 3
    config.rollout.axis = dict(samples=2, hold="samples", lr_scale="linear")
    config.rollout.prompts = 16  # of 2 samples, which are 8 of 4
    rows, state = run(config, tmp_path, monkeypatch)
    assert_learnt(rows)
    draws = [row["rollout/draws"] for row in rows]
    assert state.data_position["prompts"] == 8 * sum(draws) > 8 * STEPS  # drew more than once
    for row in rows:
        # Whole batches of groups with signal, or as many as were missing when the draws ended.
        assert row["rollout/shortfall"] == 0 or row["rollout/draws"] == 3
        assert (row["rollout/groups_without_signal"] > 0) == (row["rollout/draws"] > 1)
        assert row["rollout/prompts"] == 8 and row["rollout/lr_factor"] == 1.0
        assert row["rollout/staleness"] == row["policy/corrected"] == 0.0
        assert row["policy/max_log_weight"] < 1e-4


def test_an_online_reward_learns_beside_the_policy(tmp_path, monkeypatch):
    likes = dict(name="tests.toys.likes", weight=1.0, token=TOKEN)
    steps = dict(learning_rate=5e-3, eps=1e-5)
    implicit = dict(name="implicit_model", weight=1.0, label="likes", threshold=0.1)
    implicit["optimizer"] = steps
    config = toy_config(dict(name="prime", coef=0.5), likes=likes, implicit=implicit)
    rows, state = run(config, tmp_path, monkeypatch)
    assert_learnt(rows)
    assert rows[0]["reward/implicit"] == 0.0  # it starts as its own reference
    losses = [row["reward/implicit/loss"] for row in rows]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5) and losses[-1] < 0.6
    learner = state.rewards["device"]["implicit"]
    assert learner.keys() == {"params", "reference", "optimizer"}


@pytest.mark.slow  # training/one_pass_test.py has rows beside
def test_rehearsal_rows_train_beside_the_policy(tmp_path, monkeypatch):
    algorithm = dict(name="ppo", kl_coef=0.01, rehearsal=dict(weight=0.5))
    config = toy_config(algorithm)
    section = dict(kind="texts", max_length=64, rows=8, weight=1.0)
    config.extra = {"rehearsal": {**config.data.to_dict(), **section}}
    rows, state = run(config, tmp_path, monkeypatch)
    assert_learnt(rows)
    losses = [row["loss/rehearsal"] for row in rows]
    assert losses[-1] < losses[0]
    assert state.data_position["extra/rehearsal"] == STEPS * 8


def test_roles_are_adapters_on_one_frozen_base(tmp_path, monkeypatch):
    config = toy_config(dict(name="ppo", kl_coef=0.001))
    config.model.lora_rank = 4
    # The tied table of the base is frozen too: at width 64 and 0.02 per entry its logits could
    # not go beyond 64 * 0.02, a share of 1/6 for the best token.
    config.model.width = 256
    rows, state = run(config, tmp_path, monkeypatch)
    assert_learnt(rows)
    policy, value = state.train.params["policy"], state.train.params["value"]
    assert leaf_names(policy) == {"lora_a", "lora_b"}
    assert leaf_names(value) == {"lora_a", "lora_b", "kernel", "bias"}  # and its head
    assert "table" in leaf_names(state.reference)  # the base is the reference, kept once


@pytest.mark.slow  # training/update_test.py and one_pass_test.py have it in one update
def test_a_value_head_on_the_policy_trunk(tmp_path, monkeypatch):
    config = toy_config(dict(name="ppo", kl_coef=0.0, value_coef=0.1))
    config.model.score_heads = ("value",)
    rows, state = run(config, tmp_path, monkeypatch)
    assert_learnt(rows)
    assert state.train.params.keys() == {"policy"}
