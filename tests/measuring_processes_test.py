"""Programs that label and measure, as a job of two processes: one process's files come out."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests import evaluate_reward_test, label_steps_test
from tests.evaluate_reward_test import judge, mesh  # noqa: F401, fixtures
from tests.label_steps_test import policy_folder  # noqa: F401, a fixture
from tests.model_folders import read

TIMEOUT = 600
ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """import json
import pathlib

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""


def run(folder, program, config, processes):
    """The folder of a job that ran to its end."""
    (folder / "job.py").write_text(CONFIG)
    (folder / "job.json").write_text(config.to_json())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", f"rlhf_jax.{program}", f"--config={folder / 'job.py'}"]
    command += [f"--workdir={folder / 'run'}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    job = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    members = []
    for n in range(processes):
        own = () if processes == 1 else (*job, f"--process_id={n}")
        with (folder / f"log_{n}").open("w") as log:
            options = dict(env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=log)
            members.append(subprocess.Popen([*command, *own], **options))
    try:
        for n, member in enumerate(members):
            assert member.wait(TIMEOUT) == 0, (folder / f"log_{n}").read_text()[-3000:]
    finally:
        for member in members:
            member.kill()
            member.wait()
    return folder / "run"


@pytest.mark.slow
def test_two_processes_label_the_same_steps(policy, tmp_path):
    config = label_steps_test.config_of(policy, problems=6)
    folders = [tmp_path / str(n) for n in (1, 2)]
    found = []
    for n, folder in enumerate(folders, 1):
        folder.mkdir()
        found.append(run(folder, "label_steps", config, n))
    for name in ("steps.jsonl", "held_out_steps.jsonl"):
        one, two = (read(folder / name) for folder in found)
        assert one == two and one


@pytest.mark.slow
def test_two_processes_measure_the_same(judge, tmp_path):  # noqa: F811, a fixture
    config = evaluate_reward_test.config_of(judge[0], evaluate_reward_test.three_sets(tmp_path))
    found = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        found.append(run(folder, "evaluate_reward", config, n))
    one, two = (read(folder / "scores.jsonl") for folder in found)
    assert len(one) == len(two) > 5
    for ours, theirs in zip(one, two, strict=True):
        assert {k: v for k, v in ours.items() if "scores" not in k} == {
            k: v for k, v in theirs.items() if "scores" not in k
        }
        for name in ("scores", "step_scores"):
            assert ours.get(name, []) == pytest.approx(theirs.get(name, []), abs=1e-5)
    one, two = (json.loads((folder / "report.json").read_text())["sets"] for folder in found)
    for label in one:
        assert one[label]["counts"] == two[label]["counts"]
