"""Ensembles from a config: trained, resumed, started from, and used inside a policy run."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.ppo_tiny import get_config
from rlhf_jax import policy_run, roles, run_folder
from rlhf_jax.export import export
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.models.transformer import decoder
from rlhf_jax.ops.masking import last_true
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.rewards.base import lend_base
from rlhf_jax.train_policy import score_device
from rlhf_jax.train_reward import check, train_reward
from tests.cards import card

MEMBERS = 3


def reward_config(data, family, *, start=""):
    source = dict(kind="pairs", template="{prompt}", max_length=12, rows=4, name=f"jsonl:{data}")
    model = dict(init_from=str(start)) if start else dict(name="tiny", layers=1)
    if family == "lora":
        model |= dict(lora_rank=2, lora_targets=("query", "down"))
    return ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=2, fsdp=2),
            model=model,
            reward=dict(score_heads=("outcome",), members=MEMBERS, ensemble=family),
            card=card("pairs", "held"),
            data=dict(tokenizer=get_config().data.tokenizer),
            sources=dict(pairs=dict(**source, weight=1.0)),
            optimizer=dict(learning_rate=3e-3, schedule="constant", warmup=0),
            updates=dict(microbatches=1),
            train=dict(steps=12, max_skipped=1),
            eval=dict(every=12, sources=dict(held=source)),
            checkpoint=dict(every=6, keep=3),
            log=dict(every=1),
        )
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(pairs, a linear run, a LoRA run that started from it)."""
    root = tmp_path_factory.mktemp("ensembles")
    data = root / "pairs.jsonl"
    rows = [dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(i)) for i in range(8)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    train_reward(reward_config(data, "linear"), str(root / "linear"))
    train_reward(reward_config(data, "lora", start=root / "linear"), str(root / "lora"))
    return data, root / "linear", root / "lora"


def test_they_learn_and_say_what_they_are(folders):
    _, linear, lora = folders
    for folder, family in ((linear, "linear"), (lora, "lora")):
        config = run_folder.read_models(str(folder))["reward"]
        assert (config.members, config.ensemble) == (MEMBERS, family)
    first, last = lines(linear)[0], lines(linear)[-1]
    assert last["loss/pairs"] < 0.8 * first["loss/pairs"]
    assert last["eval/held/accuracy_of_mean"] >= 0.75 and last["eval/held/disagreement"] > 0
    # The second phase goes on from the first one's heads and trunk.
    assert lines(lora)[0]["loss/pairs"] < first["loss/pairs"]
    trunks = [
        roles.load(str(folder), make_mesh({"data": 4}), ShardingRules()) for folder in folders[1:]
    ]
    np.testing.assert_array_equal(*(trunk["embed"]["table"] for trunk in trunks))
    adapters = trunks[1]["layers"]["mlp"]["down"]["lora_b"]
    assert adapters.shape[0] == MEMBERS and float(abs(adapters[0] - adapters[1]).max()) > 0


def test_resume_is_exact(folders, tmp_path):
    data, _, lora = folders
    config = reward_config(data, "lora", start=folders[1])
    config.train.steps = 6
    train_reward(config, str(tmp_path))
    config.train.steps = 12
    train_reward(config, str(tmp_path))
    place = (make_mesh({"data": 4}), ShardingRules())
    jax.tree.map(
        np.testing.assert_array_equal,
        *(roles.load(str(folder), *place) for folder in (tmp_path, lora)),
    )


def policy_config(folder, **changes):
    config = get_config()
    config.model.layers = 1
    config.value.init_from = "policy"
    section = dict(name="ensemble", weight=1.0, init_from=str(folder), how="worst")
    config.rewards = dict(judges=section | changes)
    return config


@pytest.mark.parametrize("which", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_policy_run_scores_by_all_members(folders, which):
    """Inside the compiled step as outside of it: at the last token, on one scale, the worst."""
    folder = folders[which]
    run, state = policy_run.start(make_plan(policy_config(folder)))
    rollouts = run.sample(state, 0, jax.random.key(1))
    scores, after = score_device(run, state.rewards, state.reference, rollouts)
    own = state.rewards["device"]["judges"]
    assert jax.tree.structure(after["device"]) == jax.tree.structure(state.rewards["device"])
    assert own["mean"].shape == own["std"].shape == (MEMBERS,)
    assert "lent_base" not in own and lend_base(own, {}) == own

    model = decoder(roles.loaded_config(str(folder)), run.plan.rules)
    params = roles.load(str(folder), run.plan.mesh, run.plan.rules)
    output = evaluate_completions(model, params, {}, rollouts, temperature=1.0, rows=None)
    ends = np.asarray(last_true(rollouts.mask))
    said = [np.asarray(output.scores[f"outcome/{e}"])[ends] for e in range(MEMBERS)]
    standard = (np.array(said) - own["mean"][:, None]) / own["std"][:, None]
    np.testing.assert_allclose(scores.outcome, standard.min(axis=0), atol=1e-4)
    np.testing.assert_allclose(scores.parts["judges"], scores.outcome)
    np.testing.assert_allclose(scores.parts["judges/disagreement"], standard.std(axis=0), atol=1e-4)


def test_what_cannot_work_is_named_before_anything_runs(folders, tmp_path):
    data, linear, lora = folders
    fewer = reward_config(data, "linear", start=linear)
    fewer.reward.members = 2
    with pytest.raises(ValueError, match=r"ensemble \(linear, 3 members\).*members=2"):
        check(fewer)
    with pytest.raises(ValueError, match="this is independent with members=3"):
        check(reward_config(data, "independent", start=linear))
    other = reward_config(data, "lora", start=lora)
    other.model.lora_rank = 4
    with pytest.raises(ValueError, match=r"set model\.lora_rank=2"):
        check(other)
    named = reward_config(data, "linear")
    named.model.members = 3
    with pytest.raises(ValueError, match=r"model\.members: no such key"):
        check(named)
    smooth = reward_config(data, "linear")
    smooth.updates.smoothing = 0.1
    with pytest.raises(ValueError, match=r"updates.*smoothing=0\.1 with 3 members"):
        check(smooth)
    value = policy_config(linear)
    value.value.init_from = "judges"
    with pytest.raises(ValueError, match=r"value\.init_from='judges' is an ensemble"):
        make_plan(value)
    with pytest.raises(ValueError, match="is one model; name the folder of a run with"):
        make_plan(policy_config(""))
    with pytest.raises(ValueError, match="ensemble of 3 models"):
        export(workdir=str(linear), output=str(tmp_path / "out"))


@pytest.mark.slow
def test_labels_that_follow_the_model_resume_with_it(folders, tmp_path):
    """One model with smoothing: the labels are in the checkpoint and go on as they were."""
    config = reward_config(folders[0], "linear")
    config.reward = dict(score_heads=("outcome",))
    config.updates.smoothing = 0.2
    whole = train_reward(config, str(tmp_path / "whole"))
    config.train.steps = 6
    train_reward(config, str(tmp_path / "parts"))
    config.train.steps = 12
    parts = train_reward(config, str(tmp_path / "parts"))
    tables = [np.asarray(state.train.algorithm["pairs"]) for state in (whole, parts)]
    np.testing.assert_array_equal(*tables)
    assert tables[0].shape == (8,) and np.all((tables[0] > 0.3) & (tables[0] < 1))
    assert lines(tmp_path / "whole")[-1]["pairs/label_moved"] > 0.01
