"""The run's files: what a line looks like, what a resumed run keeps, and no tensorflow."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_jax.training.writer import Writer, keep_before, plain, write_json

ROOT = pathlib.Path(__file__).parents[2]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_step_with_sorted_keys_and_python_floats(tmp_path):
    with Writer(tmp_path) as writer:
        writer.scalars(0, {"b/loss": jnp.float32(0.5), "a/score": np.float64(1.25), "c": 3})
        writer.scalars(10, {"a/score": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"a/score": 1.25, "b/loss": 0.5, "c": 3.0, "step": 0}\n{"a/score": 2.0, "step": 10}\n'
    )


def test_nan_and_infinity_are_null(tmp_path):
    with Writer(tmp_path) as writer:
        writer.scalars(1, {"a": float("nan"), "b": jnp.inf, "c": 1.0})
    assert read(tmp_path / "metrics.jsonl") == [{"a": None, "b": None, "c": 1.0, "step": 1}]


def test_samples_keep_every_character_on_one_line(tmp_path):
    text = 'a\nb\u2028c\x85"é\ud800\r'
    rows = [{"prompt": text, "parts": {"orm": np.float32(0.5)}, "truncated": np.bool_(True)}]
    with Writer(tmp_path) as writer:
        writer.samples(3, rows)
        writer.samples(4, [])
    [row] = read(tmp_path / "samples.jsonl")
    assert row == {"prompt": text, "parts": {"orm": 0.5}, "truncated": True, "step": 3}


def test_plain_values():
    assert plain({"a": jnp.arange(2), "b": (1, None, "x", float("-inf"))}) == {
        "a": [0, 1],
        "b": [1, None, "x", None],
    }


def test_a_line_is_on_disk_when_scalars_returns(tmp_path):
    """What a killed process wrote stays."""
    code = (
        "import os, signal, sys; from rlhf_jax.training.writer import Writer\n"
        "writer = Writer(sys.argv[1]); writer.scalars(0, {'a': 1.0})\n"
        "writer.samples(0, [{'b': 'c'}]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert read(tmp_path / "metrics.jsonl") == [{"a": 1.0, "step": 0}]
    assert read(tmp_path / "samples.jsonl") == [{"b": "c", "step": 0}]
    assert tags(tmp_path) == {"a": [(0, 1.0)]}


def test_a_resumed_run_writes_later_steps_again(tmp_path):
    with Writer(tmp_path) as writer:
        for step in range(5):
            writer.scalars(step, {"a": 10.0 + step})
            writer.samples(step, [{"text": "old"}, {"text": "old"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"a": 1')  # cut off by a kill
    with Writer(tmp_path, resumed=3) as writer:
        for step in (3, 4):
            writer.scalars(step, {"a": 20.0 + step})
            writer.samples(step, [{"text": "new"}])
    expected = [(0, 10.0), (1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
    lines = read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["a"]) for line in lines] == expected
    samples = [(line["step"], line["text"]) for line in read(tmp_path / "samples.jsonl")]
    assert samples == [(s, "old") for s in (0, 0, 1, 1, 2, 2)] + [(3, "new"), (4, "new")]
    assert tags(tmp_path) == {"a": expected}


def tags(folder):
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_a_run_that_starts_at_0_again_drops_everything(tmp_path):
    for _ in range(2):
        with Writer(tmp_path) as writer:
            writer.scalars(0, {"a": 1.0})
    assert len(read(tmp_path / "metrics.jsonl")) == 1


def test_a_foreign_file_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for bad in ("not json", "[1]", '{"a": 1}'):
        text = f'{{"step": 0}}\n{bad}\n{{"step": 1}}\n'
        path.write_text(text)
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a line"):
            keep_before(path, 5)
        assert path.read_text() == text


def test_summary_is_whole_or_not_there(tmp_path):
    with Writer(tmp_path) as writer:
        writer.summary({"b": jnp.float32(0.5), "a": {"c": float("nan")}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": {"c": None}, "b": 0.5}
    with pytest.raises(AttributeError):
        write_json(tmp_path / "summary.json", {"a": object()})
    assert json.loads((tmp_path / "summary.json").read_text())["b"] == 0.5


def test_progress_tells_step_metrics_and_time_left(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 2.0, 4.0, 104.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Writer(tmp_path) as writer:
        for step in range(1, 5):
            writer.progress(step, 100, {"objective/score": 0.12345})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/100 | objective/score 0.1235",
        "step 2/100 | 2 s/step | 3 min 16 s left | objective/score 0.1235",
        "step 3/100 | 2 s/step | 3 min 14 s left | objective/score 0.1235",
        "step 4/100 | 2 s/step | 3 min 12 s left | objective/score 0.1235",
    ]


def test_a_closed_writer_says_so(tmp_path):
    writer = Writer(tmp_path)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.scalars(0, {"a": 1.0})


def test_tensorflow_is_never_imported_even_where_it_is_installed(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    code = (
        "import sys; from rlhf_jax.training import checkpoint; "
        "from rlhf_jax.training.writer import Writer\n"
        "with Writer(sys.argv[1], resumed=1) as writer: writer.scalars(1, {'a': 1.0})\n"
        "assert 'tensorflow' not in sys.modules; print('done')"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "done\n", ended.stderr[-2000:]
