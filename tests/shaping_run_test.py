"""Rewards that remember, in policy runs: one program, exact resume, what is refused, the config."""

import json

import jax
import numpy as np
import pytest

from configs.ppo_tiny import get_config
from rlhf_jax import policy_run
from rlhf_jax.learned_judge import check_learned
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.train_policy import score_device, score_host, train_policy
from rlhf_jax.training.keys import Purpose, step_key
from tests import compiling


def small_config(**outcome):
    """Two batches of statistics, rewards on both places, answers of the data as references."""
    config = get_config()
    config.model = dict(name="tiny", init_from="", layers=1, remat="none")
    config.data.options.update(train=24, test=8)
    config.algorithm = dict(name="reinforce_plus_plus", kl_coef=0.0)
    shaped = dict(relative=dict(answers="answer"), scale=dict(batches=2, limit=1.0))
    penalty = dict(tokens=8, coef=2.0, batches=2)
    config.rewards = dict(
        outcome=dict(name="outcome_model", weight=1.0, init_from="", normalise=True, **shaped)
        | outcome,
        length=dict(name="length", weight=0.1, per_token=1.0, length_penalty=penalty),
        exact=dict(name="exact_match", weight=1.0, length_penalty=penalty),
    )
    config.train.steps = 4
    config.checkpoint = dict(every=2, keep=4)
    config.updates.minibatches = 1
    return config


def lines(workdir, name):
    rows = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_scores_compile_once_and_references_are_those_of_the_start():
    plan = make_plan(small_config())
    with jax.set_mesh(plan.mesh):
        run, state = policy_run.start(plan)
        rollouts = run.sample(state, 0, step_key(0, Purpose.SAMPLE, 0))
        rewards = state.rewards
        for _ in range(3):
            device, rewards = score_device(run, rewards, state.reference, rollouts)
            _, rewards = score_host(run, rewards, state.reference, rollouts)
    assert run.steps.score.compiled._cache_size() == 1
    assert int(rewards["device"]["outcome"]["ring"]["seen"]) == 3
    assert int(rewards["host"]["exact"]["ring"]["seen"]) == 3
    reference = np.asarray(rewards["device"]["outcome"]["inner"]["reference"])
    assert reference.shape == (24,) and len(np.unique(reference)) > 12  # one for each problem
    # The part is the model's own score; beside the reference, and normalised, it is this.
    inner = rewards["device"]["outcome"]["inner"]["inner"]
    mean, std = (float(inner[name]) for name in ("mean", "std"))
    raw = np.asarray(device.parts["outcome"])
    beside = (raw - mean) / std - reference[np.asarray(rollouts.prompts.record)].repeat(4)
    won = 1 / (1 + np.exp(-beside))
    wanted = np.clip((won - won.mean()) / won.std(), -1, 1)
    length = np.asarray(rollouts.mask.sum(-1))
    priced = length + 2.0 * (1 - length / 8) * length.std()
    np.testing.assert_allclose(device.outcome, wanted + 0.1 * priced, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_compiles_once_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    started = compiling.remember_runs(monkeypatch)
    whole = train_policy(small_config(), str(tmp_path / "whole"))
    config = small_config()
    config.train.steps = 2
    train_policy(config, str(tmp_path / "parts"))
    config.train.steps = 4
    parts = train_policy(config, str(tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert lines(tmp_path / "whole", "metrics.jsonl") == lines(tmp_path / "parts", "metrics.jsonl")
    for run in started:
        assert set(compiling.times_compiled(run).values()) == {1}, compiling.times_compiled(run)
    assert int(whole.rewards["device"]["outcome"]["ring"]["seen"]) == 4
    assert int(whole.rewards["host"]["exact"]["ring"]["seen"]) == 4


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (dict(relative=dict(answers="aswer")), r"relative.answers.*no field 'aswer'; the record"),
        (dict(relative=dict(answer="answer")), r"outcome.relative.answer: no such key; did you"),
        (dict(clip=3.0), r"rewards.outcome.clip=3.0 beside relative"),
        (dict(scale=dict(limit=-1.0)), r"rewards.outcome.scale: limit=-1.0; wanted a number"),
        (dict(length_penalty=dict(coef=2.0)), r"rewards.outcome.length_penalty.tokens is missing"),
        (dict(length_penalty=dict(tokens=0)), r"outcome.length_penalty.tokens=0; wanted 1"),
        (
            dict(name="process_model", head="process"),
            r"outcome.relative changes scores of whole completions, and process_model has none wi",
        ),
    ],
)
def test_what_cannot_be_is_refused(outcome, message):
    with pytest.raises(ValueError, match=message):
        make_plan(small_config(**outcome))


def test_a_judge_has_no_memory():
    with pytest.raises(ValueError, match=r"rewards.outcome.relative is of the run that trains"):
        check_learned("outcome", small_config().rewards.outcome)
