"""Every config: loads, is locked against typos, is plain values, and names what exists."""

import importlib
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from configs.methods import METHODS
from configs.pairs import KINDS
from rlhf_jax import evaluate_best_of, label_steps, sections, train_reward
from rlhf_jax.find import members
from rlhf_jax.pipeline import PROGRAMS, check
from rlhf_jax.policy_plan import make_plan

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


def load(name, *arg):
    config = importlib.import_module(f"configs.{name}").get_config(*arg)
    config.lock()
    return config


def leaves(tree):
    if isinstance(tree, ConfigDict | dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


@pytest.mark.parametrize("name", NAMES)
def test_a_config_holds_values_only(name):
    config = load(name)
    assert all(isinstance(leaf, bool | int | float | str) for leaf in leaves(config))
    json.loads(config.to_json())
    docstring = importlib.import_module(f"configs.{name}").__doc__
    assert f"configs/{name}.py" in docstring and "--workdir=" in docstring


@pytest.mark.parametrize("name", NAMES)
def test_a_typo_dies_with_a_suggestion(name):
    with pytest.raises(AttributeError, match="seed"):
        load(name).sede = 1
    with pytest.raises(TypeError):
        load(name).seed = "one"


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_what_exists(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load(name)
    if "stages" in config:
        assert {stage.program for _, stage in check(config)} <= PROGRAMS.keys()
    elif "label" in config:
        sections.check("label_steps", config)
        label_steps.check_config(config)
    elif "reward_sets" in config:
        sections.check("evaluate", config)
    elif "best_of" in config:
        sections.check("evaluate", config)
        evaluate_best_of.check_config(config)
    else:
        plan = make_plan(config)
        assert plan.described["policy"].vocab_size == plan.tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_reward_model_can_be_had_by_one_argument(kind):
    about = "origin=o,annotators=a,aggregation=b,licence=l,model_licence=m"
    config = load("pairs", f"kind={kind},train=a.jsonl,test=b.jsonl,{about}")
    assert {stage.program for _, stage in check(config)} <= PROGRAMS.keys()
    planned = train_reward.check(config.stages.reward.config)
    assert set(planned.described.score_heads) == set(KINDS[kind]["score_heads"])
    assert (planned.joint is not None) == (kind != "outcome")


def test_every_algorithm_has_the_settings_of_its_paper():
    algorithms = {paper["algorithm"].get("name", method) for method, paper in METHODS.items()}
    assert algorithms == set(members("algorithms"))


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_a_paper_can_be_planned(method, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load("methods", f"method={method}")
    plan = make_plan(config)
    assert config.algorithm.name == METHODS[method]["algorithm"].get("name", method)
    assert (plan.pretraining.steps > 0) == ("pretrain" in METHODS[method])
    assert plan.sizes.samples >= plan.algorithm.needs.min_group
