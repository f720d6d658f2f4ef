"""A run's folder: belongs to one config, and says what its models are."""

import json

import pytest
from ml_collections import ConfigDict

from rlhf_jax import run_folder
from rlhf_jax.models.config import named_size


def config(**train):
    return ConfigDict(dict(seed=0, train=dict(steps=3) | train, log=dict(every=1), model=dict(a=1)))


def test_a_folder_of_another_config_is_refused_with_the_differences(tmp_path):
    run_folder.prepare(str(tmp_path), config(), {})
    other = config()
    other.model.a = 2
    with pytest.raises(ValueError, match=r"model\.a: 1 in the folder, 2 now"):
        run_folder.prepare(str(tmp_path), other, {})
    # Nothing was overwritten.
    assert json.loads((tmp_path / "config.json").read_text())["model"]["a"] == 1


def test_a_run_may_become_longer(tmp_path):
    run_folder.prepare(str(tmp_path), config(), {})
    run_folder.prepare(str(tmp_path), config(steps=9), {})


def test_models_are_read_back_by_role(tmp_path):
    models = {"policy": named_size("tiny", lora_rank=2), "value": named_size("tiny")}
    run_folder.prepare(str(tmp_path), config(), models)
    assert run_folder.read_models(str(tmp_path)) == models


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        run_folder.read_models(str(tmp_path))


def test_differences_name_fields_on_both_sides():
    lines = run_folder.differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4})
    assert [line.partition(":")[0] for line in lines] == ["a.b", "c", "d"]


def test_peak_memory_is_measured():
    assert run_folder.peak_memory_bytes() > 1 << 20
