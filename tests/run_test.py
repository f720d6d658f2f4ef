"""Whole runs of configs/ppo_tiny.py as a user starts them: resume, kill, devices, processes.

Every run here is a process of its own, so nothing is shared but the files. What is compared is
what a run leaves: params_sha256, metrics.jsonl without times, samples.jsonl.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 12
TIMEOUT = 400  # seconds a run may take on a busy machine


def command(workdir, *flags):
    return [
        *(sys.executable, "-m", "rlhf_jax.train_policy"),
        *("--config=configs/ppo_tiny.py", f"--workdir={workdir}"),
        *("--config.model.layers=1", "--config.log.samples_every=4"),
        *flags,
    ]


def environment(devices=1):
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
    )
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }


def start(workdir, *flags, devices=1):
    with pathlib.Path(f"{workdir}.log").open("a") as log:
        return subprocess.Popen(
            command(workdir, *flags), cwd=ROOT, env=environment(devices), stdout=log, stderr=log
        )


def wait(*processes):
    for process in processes:
        assert process.wait(TIMEOUT) == 0


def run(workdir, *flags, devices=1):
    process = start(workdir, *flags, devices=devices)
    status = process.wait(TIMEOUT)
    assert status == 0, pathlib.Path(f"{workdir}.log").read_text()[-3000:]
    return workdir


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def lines(workdir, name):
    rows = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def assert_same_run(one, other):
    assert summary(one)["params_sha256"] == summary(other)["params_sha256"]
    assert lines(one, "metrics.jsonl") == lines(other, "metrics.jsonl")
    assert lines(one, "samples.jsonl") == lines(other, "samples.jsonl")


def assert_close_run(one, other, tolerance):
    ours, theirs = lines(one, "metrics.jsonl"), lines(other, "metrics.jsonl")
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody disturbs."""
    return run(tmp_path_factory.mktemp("whole") / "run")


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


def test_stop_and_resume_is_never_stopped(whole, tmp_path):
    workdir = run(tmp_path / "run", "--config.train.steps=7")
    assert summary(workdir)["steps"] == 7
    run(workdir)
    assert summary(workdir)["resumed_at"] == 7
    assert_same_run(workdir, whole)


def test_killed_after_a_checkpoint_repeats_itself(whole, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    checkpoint = workdir / "checkpoints" / "4" / "state"
    deadline = time.time() + TIMEOUT
    while not checkpoint.exists():
        assert process.poll() is None, pathlib.Path(f"{workdir}.log").read_text()[-3000:]
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "summary.json").exists()
    run(workdir)
    assert summary(workdir)["resumed_at"] in (4, 8)
    assert_same_run(workdir, whole)


@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 2}, {"data": 1, "fsdp": 4}])
def test_four_devices_are_one(whole, tmp_path, mesh):
    flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    workdir = run(tmp_path / "run", *flags, devices=4)
    # Samples are equal but where two logits are closer than rounding: none are in this run.
    assert (
        lines(workdir, "samples.jsonl")[0]["completion"]
        == (lines(whole, "samples.jsonl")[0]["completion"])
    )
    assert_close_run(workdir, whole, 1e-3)


def test_two_processes_are_one(whole, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    workdir = tmp_path / "run"
    wait(*(start(workdir, *job, f"--process_id={number}") for number in range(2)))
    assert summary(workdir)["processes"] == 2
    assert_close_run(workdir, whole, 1e-5)
