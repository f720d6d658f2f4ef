"""Every config: loads, is locked against typos, is plain values, and names what exists."""

import importlib
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from configs.length import INTERVENTIONS, PAIRS
from configs.methods import METHODS
from configs.pairs import KINDS
from rlhf_jax import build, evaluate_best_of, label_steps, sections, train_reward
from rlhf_jax.find import members
from rlhf_jax.pipeline import PROGRAMS, check
from rlhf_jax.policy_plan import make_plan

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
REWARD_KEYS = ("length_penalty", "scale", "relative")
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


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_an_intervention_is_one_key_and_can_be_built(intervention, tmp_path, monkeypatch):
    """Of the pairs, which are drawn, or of the policy's run, which is planned for a small model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent))  # problems are made once
    pairs = [
        dict(prompt=f"{i}+1\n", chosen=f"{i + 10}", rejected=f"{i + 11}", confidence=0.5)
        for i in range(40)
    ]
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    named = f",pairs={tmp_path / 'pairs.jsonl'}" if intervention == "truncate" else ""
    config, plain = load("length", f"intervention={intervention}{named}"), load("length")
    changed = [name for name in plain.order if config.stages[name] != plain.stages[name]]
    stage = "reward" if intervention in PAIRS else "policy"
    assert changed == ([] if intervention == "none" else [stage])
    reward, policy = config.stages.reward.config, config.stages.policy.config
    sections.check("train_reward", reward)
    sections.check("train_policy", policy)
    reward.sources.pairs.name = f"jsonl:{tmp_path / 'pairs.jsonl'}"
    source = build.examples("sources.pairs", reward.sources.pairs, build.tokenizer(reward), 0)
    assert len(source) == dict(augment=50, truncate=32).get(intervention, 40)
    policy.data.options.update(train=40, test=20)
    policy.unlock()
    policy.model = dict(name="tiny", init_from="")
    policy.rewards.outcome.init_from = ""
    plan = make_plan(policy)
    made = {key: key in policy.rewards.outcome for key in REWARD_KEYS}
    assert made == {key: intervention in (key, key.removeprefix("length_")) for key in made}
    assert plan.algorithm.targets.__qualname__.startswith("omit") == (intervention == "omit")


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


def test_a_run_that_a_method_starts_from_brings_its_prompts(tmp_path):
    """And another model its tokenizer; the other keys stay the config's."""
    own = load("quickstart").stages.sft.config.data.to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"data": own}))
    config = load("methods", f"method=dapo,init_from={tmp_path}")
    assert config.data.to_dict() == own
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = load("methods", f"method=dapo,init_from={tmp_path}")
    plain = load("methods", "method=dapo").data.to_dict()
    assert config.data.to_dict() == plain | dict(tokenizer=str(tmp_path))
