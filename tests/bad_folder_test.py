"""Folders that cannot be used: of another run, files, damaged, full; and command lines.

Like `tests/bad_input_test.py`; some cases are processes of their own, for the status that a shell
sees.
"""

import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

import pytest

from configs import ppo_tiny, quickstart
from rlhf_jax import program, run_folder
from rlhf_jax.pipeline import pipeline
from rlhf_jax.train_policy import train_policy
from rlhf_jax.train_sft import train_sft
from rlhf_jax.training.checkpoint import check_newest
from tests.bad_input_test import (  # noqa: F401
    MAINS,
    config_of,
    made_once,
    put,
    refused,
    trained_run,
)
from tests.models.load_test import KINDS, write_folder
from tests.processes import ROOT, ends_of, environment


def test_a_workdir_of_another_config(trained, tmp_path, capsys):
    config = config_of("train_sft", trained)
    run_folder.prepare(str(tmp_path), config, {})
    config.seed, config.updates.microbatches, config.log.every = 1, 2, 7
    line = refused(train_sft, config, tmp_path, capsys)
    assert "seed: 0 in the folder, 1 now; updates.microbatches: 1 in the folder, 2 now" in line
    assert "log.every" not in line  # what a run logs may change
    (tmp_path / "config.json").write_text('{"seed"')
    assert "config.json is not JSON" in refused(train_sft, config, tmp_path, capsys)


@pytest.mark.parametrize("name", ["train_policy", "train_sft", "label_samples", "pipeline"])
def test_a_workdir_that_is_a_file(name, trained, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    config = config_of(name, trained)
    line = refused(MAINS.get(name, pipeline), config, tmp_path / "run", capsys)
    assert line == f"workdir {tmp_path}/run is a file; name a folder, which is made if need be"
    line = refused(MAINS.get(name, pipeline), config, tmp_path / "run/deeper", capsys)
    assert "deeper cannot be made: Not a directory" in line


def newest(trained: pathlib.Path, tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A copy of the run, and the largest file of its checkpoint."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", trained, copy], check=True)
    files = (copy / "checkpoints").rglob("d/*")
    return copy, max(files, key=lambda file: file.stat().st_size)


DAMAGES = {
    "cut": (lambda copy, data: os.truncate(data, 1000), "is not complete: .* ends at byte 1000 of"),
    "absent": (lambda copy, data: data.unlink(), "is not complete: .* is absent"),
    "none": (lambda copy, data: os.rename(copy / "checkpoints", copy / "x"), "no checkpoint in "),
    "model": (lambda copy, data: (copy / "model.json").write_text("{"), "model.json is not JSON"),
    "empty": (lambda copy, data: (copy / "model.json").unlink(), "it has no model.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train_policy", "label_samples", "train_sft", "pipeline"])
def test_a_damaged_checkpoint_is_named(damage, name, trained, tmp_path, capsys):
    copy, data = newest(trained, tmp_path)
    change, message = DAMAGES[damage]
    change(copy, data)
    config = config_of(name, trained)
    path = "stages.sft.config." if name == "pipeline" else ""
    put(config, f"{path}model", dict(init_from=str(copy)))
    line = refused(MAINS.get(name, pipeline), config, tmp_path / "run", capsys)
    assert "model.init_from" in line and re.search(message, line), line


def test_a_damaged_published_model_is_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", KINDS["llama"])
    config = ppo_tiny.get_config()
    config.model = dict(init_from=str(folder))
    config.data.template, config.data.tokenizer = "1", "chars:1"
    os.truncate(folder / "model.safetensors", 2000)
    line = refused(train_policy, config, tmp_path / "run", capsys)
    assert re.search("model.init_from=.*model.safetensors is no safetensors file", line), line
    (folder / "config.json").write_text(json.dumps(dict(model_type="gpt5")))
    line = refused(train_policy, config, tmp_path / "run", capsys)
    assert re.search("model_type='gpt5'; known are llama", line), line


def test_a_stage_may_become_longer_unless_others_were_made_from_it(tmp_path, capsys):
    config = quickstart.get_config("small")
    config.stages.policy.config.rollout.prompts = 3
    run_folder.prepare(str(tmp_path), config, {})
    for stage in ("sft", "labels"):
        (tmp_path / stage).mkdir()
    (tmp_path / "sft/summary.json").write_text('{"steps": 120, "seconds": 1}')
    config.stages.sft.config.train.steps = 130
    line = refused(pipeline, config, tmp_path, capsys)
    assert "stages.sft.config.train.steps=130 but the stage ended after 120, and labels" in line
    (tmp_path / "labels").rmdir()
    # Nothing else is against it: what stops now is the mistake in a later stage.
    assert "rollout.prompts=3" in refused(pipeline, config, tmp_path, capsys)


def start(program: str, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", f"rlhf_jax.{program}", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment(XLA_FLAGS=""), **pipes)


CONFIGS = {
    "def get_config():\n    return {}['a']\n": "c.py line 2: KeyError: 'a'",
    "def get_config(:\n": "c.py line 1: SyntaxError: invalid syntax",
    "import nothing_like_it\n": "c.py line 1: ModuleNotFoundError: No module named",
    "def get_config():\n    raise ValueError('mine')\n": "c.py line 2: ValueError: mine",
    "open('nowhere')\n": "c.py: [Errno 2] No such file or directory: 'nowhere'",
    "x = 1\n": "c.py: wanted a function get_config that returns a ConfigDict",
    "def get_config():\n    return {'a': 1}\n": "c.py: wanted a function get_config that returns",
}


def test_command_lines_end_with_status_2(tmp_path):
    tiny, workdir = "--config=configs/ppo_tiny.py", f"--workdir={tmp_path}/run"
    cases = [((tiny, workdir, "stray"), "unknown arguments: stray; wanted --config=FILE")]
    cases += [((tiny,), "--workdir"), ((tiny, workdir, "--config.seed=x"), "x")]
    for number, (text, message) in enumerate(CONFIGS.items()):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "c.py").write_text(text)
        cases.append(((f"--config={tmp_path}/{number}/c.py", workdir), message))
    ends = ends_of([("train_policy", *flags) for flags, _ in cases], tmp_path / "said")
    for done, (_, message) in zip(ends, cases, strict=True):
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error: ") == 1, done.stderr
        assert message in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


LONG = """
from configs.quickstart import get_config as stages

def get_config():
    config = stages("small").stages.sft.config
    config.model.name = "tiny"
    config.checkpoint.every = 2
    config.train.steps = 30
    config.log.show = ()
    return config
"""


@pytest.mark.slow  # run_test.py has a run that is killed while it saves
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes: Linux")
def test_a_full_disk_loses_nothing(tmp_path):
    """Files of a running program may not grow any more: one line, and it goes on later."""
    (tmp_path / "c.py").write_text(LONG)
    workdir = tmp_path / "run"
    flags = (f"--config={tmp_path}/c.py", f"--workdir={workdir}")
    process = start("train_sft", *flags, "--config.train.steps=100000")
    while not (workdir / "checkpoints/2").is_dir():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == program.DISK_ERROR, stderr
    # TensorStore's threads may say beside it that orbax's event loop is closed.
    (last,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "File too large" in last and "make room" in last
    good = check_newest(workdir)
    assert f"step {good.name} is the last whole one" in last
    process = start("train_sft", *flags, f"--config.train.steps={int(good.name) + 2}")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert json.loads((workdir / "summary.json").read_text())["resumed_at"] == int(good.name)
