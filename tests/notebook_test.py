"""The notebook: runs from top to bottom, and with it every stage of the shrunken quickstart."""

import json
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

from configs.quickstart import get_config
from rlhf_jax.pipeline import pipeline

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after all cells ran, and the folder that it trained in."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_WORKDIR", str(folder / "run"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XLA_FLAGS", "")  # one device and all optimisations, as for a newcomer
        patch.delenv("NPROC")
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(notebook, timeout=900, resources=resources).execute()
    return notebook, folder / "run"


def outputs(notebook):
    """What the code cells printed, and how many pictures they show."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in found if output.output_type == "stream")
    return text, sum("image/png" in output.get("data", {}) for output in found)


def test_it_shows_numbers_samples_and_curves(executed):
    notebook, _ = executed
    text, pictures = outputs(notebook)
    assert "policy/accuracy" in text and "process_model/step_auc" in text
    assert "sft" in text and "wrong" in text and "right" in text
    assert pictures == 2


def test_the_copy_in_the_repository_keeps_its_outputs():
    text, pictures = outputs(nbformat.read(NOTEBOOK, as_version=4))
    assert "policy/accuracy" in text and pictures == 2


def test_every_stage_leaves_its_folder(executed):
    _, workdir = executed
    config = get_config("small")
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
    _, workdir = executed
    text = (workdir / "evaluation/evaluation.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 4 * get_config("small").stages.evaluation.config.problems
    for row in rows:
        assert {"stage", "mode", "prompt", "expression", "completion"} <= row.keys()
        answer = eval(row["expression"], {"__builtins__": {}})
        assert row["correct"] == (row["completion"].rpartition("#### ")[2] == str(answer))


def test_it_learns(executed):
    """Shrunken, the job is noisier, but PPO still gains more than chance gives."""
    _, workdir = executed
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["policy/accuracy_low"] > summary["sft/accuracy_high"]
    assert summary["process_model/balanced_accuracy"] > 0.6


def test_a_second_call_finds_every_stage_done(executed):
    _, workdir = executed
    before = (workdir / "sft/metrics.jsonl").read_text()
    summary = json.loads((workdir / "summary.json").read_text())
    config = get_config("small")
    for stage in ("sft", "reward"):
        config.stages[stage].config.log.every = 50  # as in the notebook
    again = pipeline(config, str(workdir))
    assert {name: again[name] for name in summary if "accuracy" in name} == {
        name: summary[name] for name in summary if "accuracy" in name
    }
    assert (workdir / "sft/metrics.jsonl").read_text() == before
