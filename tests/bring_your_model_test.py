"""The notebook that brings a model and takes it home: runs from top to bottom."""

import json
import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "bring_your_model.ipynb"


STEPS = "policy.rollout.prompts, policy.train.steps = 8, 60"
WHOLE = pytest.param("as it stands", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["smaller", WHOLE])
def executed(request, tmp_path_factory):
    """The notebook after all cells ran, and the folder that it worked in.

    Ordinarily it trains a quarter of the steps, with programs that are compiled as the suite's.
    """
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    flags = ""  # one device and all optimisations, as for a newcomer
    if request.param == "smaller":
        (cell,) = (cell for cell in notebook.cells if STEPS in cell.source)
        cell.source = cell.source.replace(STEPS, STEPS.replace("60", "15"))
        flags = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_WORKDIR", str(folder))
        patch.delenv("RLHF_MODEL", raising=False)
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XLA_FLAGS", flags)
        patch.delenv("NPROC")
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(notebook, timeout=900, resources=resources).execute()
    return notebook, folder


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_model_comes_home(executed):
    notebook, folder = executed
    assert "largest difference" in printed(notebook)
    for name, file in (("mine", "model.safetensors"), ("adapters", "adapter_model.safetensors")):
        assert (folder / name / file).is_file()
        assert (folder / name / "tokenizer.json").is_file()


def test_its_adapters_were_trained(executed):
    _, folder = executed
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["after/kl_low"] > 0


def test_the_copy_in_the_repository_keeps_its_outputs():
    assert "largest difference" in printed(nbformat.read(NOTEBOOK, as_version=4))
