"""Whole runs of configs/ppo_tiny.py: resume, kill, devices, processes.

What is compared is what a run leaves: params_sha256, metrics.jsonl without times, samples.jsonl,
checkpoints. Most runs are processes of their own, started as a user starts them, so that nothing
is shared but the files.
"""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs.ppo_tiny import get_config
from rlhf_jax.train_policy import train_policy
from rlhf_jax.training.checkpoint import restore_subtree
from tests import compiling
from tests.processes import ROOT, environment

STEPS = 12
TIMEOUT = 400  # seconds a run may take on a busy machine
TOLERANCE = 1e-5  # float32; sums are taken in another order


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder of compiled programs that all runs in processes of their own share."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def start(programs):
    """Starts a run in a process of its own with one device; its output goes to <workdir>.log."""
    running = []

    def start_run(workdir, *arguments, level=3):
        command = [
            *(sys.executable, "-m", "rlhf_jax.train_policy"),
            *("--config=configs/ppo_tiny.py", f"--workdir={workdir}", *arguments),
        ]
        variables = environment(
            **compiling.environment(programs),
            XLA_FLAGS=f"--xla_backend_optimization_level={level}",
        )
        with log_of(workdir).open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)
        running.append(process)
        return process

    yield start_run
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def run(start):
    """Runs to the end; gives the run's folder back."""

    def run_to_end(workdir, *arguments):
        status = start(workdir, *arguments).wait(TIMEOUT)
        assert status == 0, tail(workdir)
        return workdir

    return run_to_end


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The run that nobody disturbs, on one device."""
    return run(tmp_path_factory.mktemp("whole") / "run")


def log_of(workdir):
    return pathlib.Path(f"{workdir}.log")


def tail(workdir):
    return log_of(workdir).read_text()[-3000:]


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def lines(workdir, name):
    rows = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def assert_same_run(one, other):
    """Bit for bit."""
    assert summary(one)["params_sha256"] == summary(other)["params_sha256"]
    assert lines(one, "metrics.jsonl") == lines(other, "metrics.jsonl")
    assert lines(one, "samples.jsonl") == lines(other, "samples.jsonl")


def assert_close_run(one, other):
    """The same texts and, within TOLERANCE, the same numbers in every step.

    Rounding could change a text, where two tokens are as good as equal when one is drawn; it
    changes none in these runs.
    """
    for name, count in (("metrics.jsonl", STEPS), ("samples.jsonl", STEPS)):
        ours, theirs = lines(one, name), lines(other, name)
        assert len(ours) == len(theirs) == count
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            for field in a:
                wanted = b[field]
                if isinstance(wanted, float):
                    wanted = pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE)
                assert a[field] == wanted, (name, a["step"], field)
    ours, theirs = last_params(one), last_params(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(path))


def last_params(workdir):
    """The parameters in the last checkpoint, on one device."""
    manifest = json.loads((workdir / f"checkpoints/{STEPS}/manifest/metadata").read_text())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    prefix = "train/params/"
    target = {
        name.removeprefix(prefix): jax.ShapeDtypeStruct(*shape_and_type, sharding=place)
        for name, shape_and_type in manifest["leaves"].items()
        if name.startswith(prefix)
    }
    assert target
    tree = {}
    for name, leaf in target.items():
        *folders, last = name.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = leaf
    return restore_subtree(workdir, ("train", "params"), tree)


def test_a_run_leaves_its_folder(whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        *("config.json", "model.json", "metrics.jsonl", "samples.jsonl", "summary.json"),
        *("tensorboard", "checkpoints"),
    }
    rows = lines(whole, "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS))
    facts = summary(whole)
    assert facts["steps"] == STEPS
    assert facts["resumed_at"] == 0
    assert facts["peak_memory_bytes"] > 0
    # Old log-probs are evaluated in the update's chunks: the first ratio is exactly 1.
    assert all(row["update/first_logprob_gap"] == 0.0 for row in rows)
    assert all(row["policy/sampler_gap"] < 1e-5 for row in rows)


def test_stopped_and_killed_during_a_checkpoint_it_repeats_itself(whole, start, run, tmp_path):
    workdir = run(tmp_path / "run", "--config.train.steps=7")
    assert summary(workdir)["steps"] == 7
    process = start(workdir, "--config.train.steps=100")  # the length of a run may change
    deadline = time.time() + TIMEOUT
    while not list(workdir.glob("checkpoints/8*")):  # begun, and perhaps complete
        assert process.poll() is None, tail(workdir)
        assert time.time() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "resumed_at 7 in" in log_of(workdir).read_text()
    assert summary(workdir)["steps"] == 7  # no other end
    run(workdir)
    # 12: this test slept long before it could kill.
    assert summary(workdir)["resumed_at"] in (7, 8, 12)
    assert_same_run(workdir, whole)


MESHES = [{"data": 2, "tensor": 2}, {"data": 1, "fsdp": 4}]


@pytest.mark.slow  # updates on four devices: training/update_test.py; two processes: below
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_four_devices_are_one(whole, tmp_path, mesh, monkeypatch):
    """Generate, score, evaluate and update give the numbers of one device; compiled once each."""
    config = get_config()
    config.mesh.update(mesh)
    started = compiling.remember_runs(monkeypatch)
    train_policy(config, str(tmp_path / "run"))
    compiled = compiling.times_compiled(started[0])
    assert compiled == dict.fromkeys(("generate", "score", "evaluate", "monitor", "update"), 1)
    assert summary(tmp_path / "run")["devices"].startswith("4 x")
    assert_close_run(tmp_path / "run", whole)


# Resume of one process is above, checkpoints of two are in training/checkpoint_test.py.
@pytest.mark.parametrize("stops", [(), pytest.param((7,), marks=pytest.mark.slow)], ids=str)
def test_two_processes_are_one_and_resume(whole, start, tmp_path, stops):
    workdir = tmp_path / "run"
    for steps in (*stops, STEPS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
        job.append(f"--config.train.steps={steps}")
        members = [start(workdir, *job, f"--process_id={n}", level=0) for n in range(2)]
        for member in members:
            assert member.wait(TIMEOUT) == 0, tail(workdir)
    assert summary(workdir)["processes"] == 2
    assert summary(workdir)["resumed_at"] == (7 if stops else 0)
    assert_close_run(workdir, whole)
