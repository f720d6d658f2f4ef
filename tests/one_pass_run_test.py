"""Runs whose batches are trained on once, and whole, are evaluated by their update."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs.ppo_tiny import get_config
from rlhf_jax import policy_run
from rlhf_jax.train_policy import train_policy
from tests import compiling


def config_of(algorithm, steps, **rewards):
    config = get_config()
    config.algorithm = algorithm
    config.rewards = rewards or {"likes": dict(name="tests.toys.likes", weight=1.0, token=5)}
    config.value.init_from = "policy"
    config.updates.minibatches = 1
    config.train.steps = steps
    config.log.every, config.log.samples_every = 1, 1000
    config.checkpoint.every = 1000
    config.optimizer.policy.update(learning_rate=1e-2, warmup=0, eps=1e-8)
    return config


def run(config, workdir, monkeypatch):
    """Whether it evaluated in its update, its metrics by step, and the last parameters."""
    started = compiling.remember_runs(monkeypatch)
    state = train_policy(config, str(workdir))
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    params = jax.tree.map(np.asarray, state.train.params)
    return started[0].steps.monitor is None, [json.loads(line) for line in lines], params


def test_a_policy_at_its_reference_stays_where_nothing_is_to_learn(tmp_path, monkeypatch):
    """Update and reference round alike: the KL is 0 and not its rounding, of which Adam with its
    small eps would make whole steps."""
    silent = dict(silent=dict(name="tests.toys.likes", weight=1.0, token=10**6))
    config = config_of(dict(name="grpo", kl_coef=0.05), 2, **silent)
    at_once, rows, _ = run(config, tmp_path, monkeypatch)
    assert at_once
    assert [row["rollout/groups_without_signal"] for row in rows] == [1.0, 1.0]
    assert [row["objective/kl_ref"] for row in rows] == [0.0, 0.0]
    assert [row["policy/grad_norm"] for row in rows] == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_it_is_the_run_that_evaluates_before(name, tmp_path, monkeypatch):
    algorithm = dict(name=name, kl_coef=0.05)
    at_once, rows, params = run(config_of(algorithm, 3), tmp_path / "one", monkeypatch)
    monkeypatch.setattr(policy_run, "fits_one_pass", lambda **updates: False)
    before, other_rows, other_params = run(config_of(algorithm, 3), tmp_path / "two", monkeypatch)
    assert (at_once, before) == (True, False)
    assert len(rows) == len(other_rows) == 3
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if not name.startswith("time"):
                assert value == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)
