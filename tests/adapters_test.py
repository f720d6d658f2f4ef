"""One frozen base, one small tree of adapters per role: policy, value, outcome and process."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks.published_models import make, save
from configs.ppo_tiny import get_config
from rlhf_jax import policy_run, roles
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.lora import partition
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.rewards.base import lend_base
from rlhf_jax.train_policy import score_device, train_policy
from rlhf_jax.train_reward import train_reward
from tests.cards import card

TARGETS = ("query", "value", "down")


def leaves(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_names(tree):
    return {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def reward_config(folder, data, tokenizer):
    common = dict(template="{prompt}", max_length=24, rows=4, weight=1.0, name=f"jsonl:{data}")
    return ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1),
            model=dict(init_from=str(folder), lora_rank=2, lora_targets=TARGETS),
            reward=dict(score_heads=("outcome", "process")),
            card=card("pairs"),
            data=dict(tokenizer=tokenizer),
            sources=dict(pairs=dict(kind="pairs", **common)),
            optimizer=dict(learning_rate=1e-2, schedule="constant", warmup=0),
            updates=dict(microbatches=1),
            train=dict(steps=4, max_skipped=1),
            eval=dict(every=100, sources=dict()),
            checkpoint=dict(every=100, keep=1),
            log=dict(every=1),
        )
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a published model, a run that trained reward adapters on it, another published model)."""
    root = tmp_path_factory.mktemp("adapters")
    base = save(make("qwen3"), root / "base")
    other = save(make("qwen3", seed=1), root / "other")
    data = root / "pairs.jsonl"
    rows = [dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(i)) for i in range(8)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = get_config().data.tokenizer
    train_reward(reward_config(base, data, tokenizer), str(root / "reward"))
    return base, root / "reward", other


def policy_config(base, reward):
    config = get_config()
    config.model = dict(init_from=str(base), lora_rank=3)
    for label in ("outcome", "process"):
        config.rewards[label].init_from = str(reward)
    config.rollout.max_tokens, config.train.steps = 6, 2
    return config


@pytest.mark.slow  # in one run; tests/seams_test.py has the roles on one base
def test_every_role_is_adapters_on_one_base(folders, tmp_path):
    base, reward, _ = folders
    config = policy_config(base, reward)
    plan = make_plan(config)
    run, start = policy_run.start(plan)
    device = start.rewards["device"]
    outcome, process = device["outcome"]["inner"], device["process"]
    for state in (outcome, process):
        assert state["lent_base"] == {}
        assert leaf_names(state["params"]) == {"lora_a", "lora_b", "kernel", "bias"} or (
            leaf_names(state["params"]) == {"lora_a", "lora_b", "kernel"}
        )
        assert leaves(state["params"])["['layers']['mlp']['down']['lora_a']"].shape[-1] == 2
    assert leaf_names(start.train.params["policy"]) == {"lora_a", "lora_b"}
    value = start.train.params["value"]
    # It starts from the outcome model's adapters, not only from its head.
    for name in ("lora_a", "lora_b"):
        got, wanted = (t["layers"]["mlp"]["down"][name] for t in (value, outcome["params"]))
        np.testing.assert_array_equal(got, wanted)
    assert float(np.abs(value["layers"]["mlp"]["down"]["lora_b"]).max()) > 0
    assert "lora_a" not in leaf_names(start.reference)
    before = jax.tree.map(np.asarray, start.reference)

    # What adapters on the lent base say is what the merged reward model says.
    rollouts = run.sample(start, 0, jax.random.key(1))
    scores, states = score_device(run, start.rewards, start.reference, rollouts)
    assert jax.tree.structure(states["device"]) == jax.tree.structure(device)
    merged = roles.load(str(reward), plan.mesh, plan.rules)
    assert "lora_a" not in leaf_names(merged)
    full = policy_config(base, reward)
    full.model.lora_rank = 0
    whole, begun = policy_run.start(make_plan(full))
    assert "lent_base" not in begun.rewards["device"]["process"]
    wanted, _ = score_device(whole, begun.rewards, {}, rollouts)
    for part in ("outcome", "process"):
        np.testing.assert_allclose(scores.parts[part], wanted.parts[part], atol=1e-4)

    last = train_policy(config, str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, before, last.reference)
    assert set(leaves(last.train.opt_state["policy"])) == set(
        leaves(start.train.opt_state["policy"])
    )


def test_the_policy_starts_as_its_base_bit_for_bit(folders):
    base, reward, _ = folders
    run, state = policy_run.start(make_plan(policy_config(base, reward)))
    whole = policy_config(base, reward)
    whole.model.lora_rank = 0
    plain, started = policy_run.start(make_plan(whole))
    key = jax.random.key(0)
    ours, wanted = run.sample(state, 0, key), plain.sample(started, 0, key)
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)
    np.testing.assert_array_equal(ours.logprobs, wanted.logprobs)


def test_adapters_on_another_base_have_a_tree_of_their_own(folders):
    _, reward, other = folders
    run, state = policy_run.start(make_plan(policy_config(other, reward)))
    assert "lent_base" not in state.rewards["device"]["process"]
    assert "table" in leaf_names(state.rewards["device"]["process"]["params"])
    # The critic starts from it, so it is whole too.
    assert "table" in leaf_names(state.train.params["value"])
    assert run.plan.described["value"].lora_rank == 0


def test_a_base_that_was_changed_is_an_error(folders, tmp_path):
    base, reward, other = folders
    moved = tmp_path / "base"
    moved.mkdir()
    for path in base.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    copy = tmp_path / "reward"
    copy.mkdir()
    settings = json.loads((reward / "config.json").read_text())
    settings["model"]["init_from"] = str(moved)
    for path in reward.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(settings))
    policy_run.start(make_plan(policy_config(moved, copy)))
    (moved / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    plan = make_plan(policy_config(moved, copy))
    with pytest.raises(ValueError, match=r"rewards\.outcome\.init_from.*was that folder changed"):
        policy_run.start(plan)


def test_trainable_parameters_are_counted_exactly(tmp_path):
    """A-PE-2: 4 L r (d_in + d_out) on query, key, value and output of equal widths."""
    theirs = make(
        "qwen2", hidden_size=40, num_attention_heads=4, num_key_value_heads=4, head_dim=10
    )
    folder = save(theirs, tmp_path)
    section = ConfigDict(
        dict(init_from=str(folder), lora_rank=3, lora_targets=("query", "key", "value", "output"))
    )
    described = roles.describe(section, 101)
    mesh = make_mesh({}, devices=jax.devices()[:1])
    rules = ShardingRules()
    model = roles.decoder(described, rules)
    tree = roles.fill(model, roles.load(str(folder), mesh, rules), jax.random.key(0), mesh, rules)
    trained, frozen = partition(tree, described)
    count = sum(x.size for x in jax.tree.leaves(trained))
    assert count == 4 * 3 * 3 * (40 + 40)
    assert sum(x.size for x in jax.tree.leaves(frozen)) == sum(
        p.numel() for p in theirs.parameters()
    )


def test_lending_touches_only_the_places_kept_for_it():
    state = {
        "a": {"inner": {"params": {"x": 1}, "lent_base": {}}, "mean": 2},
        "base": {"params": {"y": 3}},
    }
    lent = lend_base(state, {"w": 4})
    assert lent["a"] == {"inner": {"params": {"x": 1}, "lent_base": {"w": 4}}, "mean": 2}
    assert lent["base"] == state["base"]
    assert lend_base(lent, {}) == state
