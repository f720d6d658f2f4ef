"""The mean of several runs' weights as one reward model, wherever reward models are loaded."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.ppo_tiny import get_config
from rlhf_jax import averages, evaluate_reward, learned_judge, model_folder, policy_run, roles
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.train_reward import train_reward
from tests.ensemble_run_test import reward_config


def run_config(data, seed, **changes):
    """One model of the ensemble test's task; LoRA on a base that a run of another seed drew."""
    config = reward_config(data, "linear")
    config.reward = dict(score_heads=("outcome",))
    config.seed, config.train.steps, config.eval.every = seed, 2, 2
    config.model.update(changes)
    return config


@pytest.fixture(name="runs", scope="module")
def trained(tmp_path_factory):
    """Two runs of one shape, and one of another."""
    root = tmp_path_factory.mktemp("averages")
    data = root / "pairs.jsonl"
    rows = [dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(i)) for i in range(8)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    for name, config in dict(
        a=run_config(data, 0), b=run_config(data, 1), wide=run_config(data, 0, mlp_width=64)
    ).items():
        train_reward(config, str(root / name))
    return {name: str(root / name) for name in ("a", "b", "wide")}


def mean_of(runs):
    place = (make_mesh({"data": 4}), ShardingRules())
    trees = [roles.load(runs[name], *place) for name in ("a", "b")]
    return jax.tree.map(lambda x, y: (np.asarray(x) + np.asarray(y)) / 2, *trees)


def close(found, wanted):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), found, wanted)


def policy_config(runs, *others):
    config = get_config()
    config.model.layers = 1
    config.value.init_from = "judge"
    section = dict(name="outcome_model", weight=1.0, init_from=runs["a"], average=others)
    config.rewards = dict(judge=section)
    return config


def test_a_policy_run_is_paid_by_the_mean(runs):
    _, state = policy_run.start(make_plan(policy_config(runs, runs["b"])))
    wanted = mean_of(runs)
    close(state.rewards["device"]["judge"]["params"], wanted)
    close(state.train.params["value"]["layers"], wanted["layers"])


def test_so_is_what_judges_samples_and_what_is_measured(runs):
    config = policy_config(runs, runs["b"])
    config.rewards.judge = config.rewards.judge.to_dict()
    plan = learned_judge._plan("judge", config, dict(lm_head=False, score_heads=("outcome",)))
    close(learned_judge._load(plan)["params"], mean_of(runs))
    config = ConfigDict(
        dict(reward=dict(init_from=runs["a"], average=(runs["b"],)), data=dict(tokenizer=""))
    )
    opened = evaluate_reward.open_model(config)
    assert opened.others == (runs["b"],)
    close(model_folder.load_params(opened, make_mesh({"data": 4}), ShardingRules()), mean_of(runs))


def test_one_folder_is_that_model_as_it_is(runs):
    place = (make_mesh({"data": 4}), ShardingRules())
    alone = averages.load((runs["a"],), *place)
    jax.tree.map(np.testing.assert_array_equal, alone, roles.load(runs["a"], *place))
    assert averages.folders_of(ConfigDict(dict(init_from=""))) == ()


def test_models_that_do_not_match_are_named_before_anything_is_read(runs):
    with pytest.raises(ValueError, match=r"rewards\.judge\.average: .*wide has mlp_width=64, .*a "):
        make_plan(policy_config(runs, runs["b"], runs["wide"]))
    with pytest.raises(ValueError, match=r"average=.* a folder twice"):
        make_plan(policy_config(runs, runs["a"]))
    with pytest.raises(ValueError, match=r"rewards\.judge\.average: .*nowhere"):
        make_plan(policy_config(runs, "nowhere"))
    without = policy_config(runs, runs["b"])
    without.rewards.judge.init_from = ""
    with pytest.raises(ValueError, match=r"but rewards\.judge\.init_from is empty"):
        make_plan(without)
    heads = ConfigDict(dict(init_from=runs["a"], average=(runs["wide"],)))
    with pytest.raises(ValueError, match=r"reward\.average: .* has mlp_width=64"):
        averages.check_average("reward", heads)
    place = (make_mesh({"data": 4}), ShardingRules())
    with pytest.raises(ValueError, match=r"average of .*: average: the models differ in shape"):
        averages.load((runs["a"], runs["wide"]), *place)
