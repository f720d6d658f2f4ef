"""The command line: bad input is one line on stderr and exit status 2, at once."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def start(program, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"rlhf_jax.{program}", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.rollout.prompts=7", "rollout.prompts=7"),
        ("--config.rollout.promts=8", "--config.rollout.promts=8: the config has no such key"),
        ("--config.rollout.promts=8", "did you mean 'prompts'?"),
        ("--config.model.layers=3", "--config.model.layers=3: the config has no such key"),
        ("--coordinator_address=127.0.0.1:1", "--num_processes"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(flag, message, tmp_path):
    workdir = tmp_path / "run"
    done = start("train_policy", "--config=configs/ppo_tiny.py", f"--workdir={workdir}", flag)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("program", "config", "key"),
    [("train_policy", "quickstart", "order"), ("pipeline", "ppo_tiny", "algorithm")],
)
def test_the_config_of_another_program(program, config, key, tmp_path):
    workdir = tmp_path / "run"
    done = start(program, f"--config=configs/{config}.py", f"--workdir={workdir}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {key}: no such key")
    assert last.endswith("is it a config for another program?")
    assert "Traceback" not in done.stderr and not workdir.exists()


def test_help_lists_the_flags():
    shown = start("evaluate", "--help").stdout
    assert "--config" in shown and "--workdir" in shown and "--coordinator_address" in shown
