"""The notebook that brings a model and takes it home: runs from top to bottom."""

import json
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "bring_your_model.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after all cells ran, and the folder that it worked in."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_WORKDIR", str(folder))
        patch.delenv("RLHF_MODEL", raising=False)
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XLA_FLAGS", "")  # one device and all optimisations, as for a newcomer
        patch.delenv("NPROC")
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(notebook, timeout=900, resources=resources).execute()
    return notebook, folder


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.slow  # its steps, one by one: export, peft, generate and adapters tests
def test_the_model_comes_home(executed):
    notebook, folder = executed
    assert "largest difference" in printed(notebook)
    for name, file in (("mine", "model.safetensors"), ("adapters", "adapter_model.safetensors")):
        assert (folder / name / file).is_file()
        assert (folder / name / "tokenizer.json").is_file()


@pytest.mark.slow
def test_its_adapters_were_trained(executed):
    _, folder = executed
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["after/kl_low"] > 0


def test_the_copy_in_the_repository_keeps_its_outputs():
    assert "largest difference" in printed(nbformat.read(NOTEBOOK, as_version=4))
