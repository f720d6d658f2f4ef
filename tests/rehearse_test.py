"""The rehearsal of a pipeline: what earlier stages will write is not asked for, all else is."""

import pathlib

import pytest
from ml_collections import ConfigDict

from configs import quickstart, verdicts
from rlhf_jax.evaluate import evaluate
from rlhf_jax.rehearse import rehearse
from tests.bad_input_test import (  # noqa: F401
    config_of,
    few_problems,
    jsonl,
    made_once,
    put,
    trained_run,
)

LATER = dict(name="jsonl:{workdir}/labels/correctness.jsonl", options=dict())
REPLAY = dict(kind="texts", **LATER, template="{prompt}", max_length=36, rows=8)


def rehearsed(changes, workdir):
    """Plans the stages of the quickstart, changed."""
    config = few_problems(quickstart.get_config("small"))
    for path, value in changes.items():
        put(config, f"stages.{path}", value)
    rehearse([(name, config.stages[name]) for name in config.order], str(workdir), ())


def test_a_policy_on_prompts_of_an_earlier_stage_still_is_a_model(tmp_path):
    later = {f"policy.config.data.{name}": value for name, value in LATER.items()}
    rehearsed(later, tmp_path)  # the evaluation starts from that policy
    with pytest.raises(ValueError, match=r"stages.policy.config: rollout.prompts=3"):
        rehearsed(later | {"policy.config.rollout.prompts": 3}, tmp_path)


def test_auxiliary_rows_of_an_earlier_stage_are_not_opened(tmp_path):
    def changes(section):
        algorithm = dict(name="ppo", rehearsal=dict(weight=0.5))
        return {
            "policy.config.algorithm": algorithm,
            "policy.config.extra": dict(rehearsal=section),
        }

    rehearsed(changes(REPLAY), tmp_path)
    with pytest.raises(ValueError, match=r"policy.config: extra.rehearsal.kind='text'"):
        rehearsed(changes(REPLAY | dict(kind="text")), tmp_path)


@pytest.mark.parametrize("label", ["policy", "outcome"])
def test_a_label_is_no_folder(label, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path(label).mkdir()
    rehearsed({"policy.config.value.init_from": label}, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"model.init_from.*{label}"):
        rehearsed({"policy.config.model.init_from": label}, tmp_path / "run")


def test_what_is_said_names_the_workdir_as_the_config_does(tmp_path):
    with pytest.raises(ValueError, match=r"config: reward.init_from: \{workdir\}/labels is not"):
        rehearsed({"evaluation.config.reward.init_from": "{workdir}/labels"}, tmp_path)


def test_gold_is_checked_before_the_first_stage(tmp_path):
    stages = few_problems(quickstart.get_config("small")).stages
    config = stages.evaluation.config.to_dict()
    del config["modes"], config["reward"]
    wrong = dict(config, gold=dict(name="outcome_model"))
    changes = {"evaluation.program": "evaluate_gold", "evaluation.config": wrong}
    with pytest.raises(ValueError, match=r"config: gold.name='outcome_model' is a learned reward"):
        rehearsed(changes, tmp_path)
    exact = dict(config, gold=dict(name="exact_match"), problems=10**6)
    with pytest.raises(ValueError, match=r"config: problems=1000000 but data has 300"):
        rehearsed(changes | {"evaluation.config": exact}, tmp_path)


@pytest.mark.parametrize("line", ["{", None])
def test_a_source_of_the_report_is_opened_before_anything_is_sampled(line, trained, tmp_path):
    config = config_of("evaluate", trained)
    pairs = config.reward.sources.pairs.to_dict()
    pairs["name"] = jsonl(
        tmp_path / "a.jsonl", *[line or dict(prompt="1", chosen="2", rejected="3")]
    )
    config.reward = ConfigDict(dict(init_from=str(trained), sources=dict(pairs=pairs)))
    said = "a.jsonl, line 1: not JSON" if line else "pairs.rows=16 but the source has 1 records"
    with pytest.raises(ValueError, match=said):
        evaluate(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_choosing_among_samples_is_a_stage_too(tmp_path):
    """A judge and a rival that are trained before it, and problems that it could not have."""
    config = few_problems(verdicts.get_config("small"))
    stages = [(name, config.stages[name]) for name in config.order]
    rehearse(stages, str(tmp_path), ())
    config.stages.evaluation.config.problems = 10_000
    with pytest.raises(ValueError, match=r"evaluation.*problems=10000"):
        rehearse(stages, str(tmp_path), ())
    config.stages.evaluation.config.update(problems=64)
    put(config, "stages.evaluation.config.best_of.weights", {"jugde": "score"})
    with pytest.raises(ValueError, match=r"best_of.weights.jugde: no such reward"):
        rehearse(stages, str(tmp_path), ())
