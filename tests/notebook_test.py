"""The notebook: runs from top to bottom, and with it every stage of the shrunken quickstart.

All of it is slow: shrunken once more it takes 100 CPU seconds, a twentieth of the ordinary suite,
whose tests run every program of it.
"""

import json
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

from configs.quickstart import get_config
from rlhf_jax.pipeline import pipeline

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
# A cell behind the one that makes the config: problems of one operation, a fifth of the steps, a
# quarter of the rows of reward model and policy.
SMALLER = """
def shorten(values):
    for key, value in values.items():
        if key == "options":
            value.update(max_ops=1, train=500, test=64)
        elif key in ("max_prompt", "max_length", "max_tokens"):
            values[key] = dict(max_prompt=7, max_length=23, max_tokens=16)[key]
        elif hasattr(value, "items"):
            shorten(value)

stages = config.stages
shorten(stages)
for name, steps in (("sft", 100), ("reward", 20), ("policy", 3)):
    stages[name].config.train.steps = steps
for stage in (stages.reward.config, stages.evaluation.config.reward):
    for name, rows in (("pairs", 4), ("correctness", 8), ("steps", 24)):
        stage.sources[name].rows = rows
stages.labels.config.label.problems = 256
stages.policy.config.rollout.prompts = 16
stages.evaluation.config.problems = 64
"""
SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in ("smaller", "as it stands")]


def config_of(size):
    """The config that the notebook trains."""
    config = get_config("small")
    for stage in ("sft", "reward"):
        config.stages[stage].config.log.every = 50
    if size == "smaller":
        exec(SMALLER, {"config": config})
    return config


@pytest.fixture(scope="module", params=SIZES)
def executed(request, tmp_path_factory):
    """The notebook after all cells ran, the folder that it trained in, and its config."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if request.param == "smaller":
        (place,) = (n for n, cell in enumerate(notebook.cells) if "get_config(C" in cell.source)
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SMALLER))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_WORKDIR", str(folder / "run"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XLA_FLAGS", "")  # one device and all optimisations, as for a newcomer
        patch.delenv("NPROC")
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(notebook, timeout=900, resources=resources).execute()
    return notebook, folder / "run", config_of(request.param)


def outputs(notebook):
    """What the code cells printed, and how many pictures they show."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in found if output.output_type == "stream")
    return text, sum("image/png" in output.get("data", {}) for output in found)


def test_it_shows_numbers_samples_and_curves(executed):
    notebook, *_ = executed
    text, pictures = outputs(notebook)
    assert "policy/accuracy" in text and "process_model/step_auc" in text
    assert "sft" in text and "wrong" in text and "right" in text
    assert pictures == 2


def test_the_copy_in_the_repository_keeps_its_outputs():
    text, pictures = outputs(nbformat.read(NOTEBOOK, as_version=4))
    assert "policy/accuracy" in text and pictures == 2


def test_every_stage_leaves_its_folder(executed):
    _, workdir, config = executed
    assert {*config.order} <= {path.name for path in workdir.iterdir() if path.is_dir()}
    assert (workdir / "report.png").stat().st_size > 10_000
    summary = json.loads((workdir / "summary.json").read_text())
    for stage in ("sft", "policy"):
        for mode in ("accuracy", "greedy_accuracy"):
            name = f"{stage}/{mode}"
            assert 0 <= summary[f"{name}_low"] <= summary[name] <= summary[f"{name}_high"] <= 1
    assert summary["policy/kl_low"] <= summary["policy/kl"] <= summary["policy/kl_high"]
    assert summary["compiles_after_warmup"] == 0
    assert summary["seconds"] > 0 and summary["peak_memory_bytes"] > 1e8


def test_every_evaluated_completion_is_on_file(executed):
    _, workdir, config = executed
    text = (workdir / "evaluation/evaluation.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 4 * config.stages.evaluation.config.problems
    for row in rows:
        assert {"stage", "mode", "prompt", "expression", "completion"} <= row.keys()
        answer = eval(row["expression"], {"__builtins__": {}})
        assert row["correct"] == (row["completion"].rpartition("#### ")[2] == str(answer))


def test_fine_tuning_learns(executed):
    _, workdir, _ = executed
    lines = (workdir / "sft/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["update/loss"] for line in lines]
    assert losses[-1] < losses[0] / 5


@pytest.mark.parametrize("executed", SIZES[1:], indirect=True)
def test_it_learns(executed):
    """Shrunken, the job is noisier, but PPO still gains more than chance gives."""
    _, workdir, _ = executed
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["policy/accuracy_low"] > summary["sft/accuracy_high"]
    assert summary["process_model/balanced_accuracy"] > 0.6


def test_a_second_call_finds_every_stage_done(executed):
    _, workdir, config = executed
    before = (workdir / "sft/metrics.jsonl").read_text()
    summary = json.loads((workdir / "summary.json").read_text())
    again = pipeline(config, str(workdir))
    assert {name: again[name] for name in summary if "accuracy" in name} == {
        name: summary[name] for name in summary if "accuracy" in name
    }
    assert (workdir / "sft/metrics.jsonl").read_text() == before
