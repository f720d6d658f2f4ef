"""Implicit reward models from folders: and what they are beside."""

import dataclasses
import gc
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import ppo_tiny
from rlhf_jax import fit, implicit_start, policy_run, roles, run_folder, train_dpo
from rlhf_jax.learned_judge import make_learned
from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.models.transformer import decoder
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.train_policy import train_policy
from rlhf_jax.training import checkpoint
from rlhf_jax.training.keys import Purpose
from tests import compiling
from tests.bad_input_test import jsonl, put, trained_run  # noqa: F401
from tests.roles_test import RULES
from tests.train_dpo_test import PAIRS, config_of, lines, same
from tests.training import tiny

BETA = 0.2  # of `config_of`
FROZEN = dict(rewards__implicit__optimizer=KeyError, rewards__implicit__label=KeyError)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, trained):
    """{name: folder}: the start, a run of `train_dpo` from it, and one of adapters on it.

    The runs are what the program would save, moved by noise in place of training, which
    tests/train_dpo_test.py does.
    """
    root = tmp_path_factory.mktemp("implicit")
    data = jsonl(root / "pairs.jsonl", *PAIRS)
    found = {"start": str(trained)}
    for name, rank in (("whole", 0), ("adapters", 2)):
        config = config_of(trained, data, model__lora_rank=rank)
        found[name] = str(root / name)
        save_moved(fit.open_sources(train_dpo.check(config)), found[name])
    return found


def save_moved(planned, folder):
    """The checkpoint of a run whose parameters moved."""
    run_folder.prepare(folder, planned.config, {"policy": planned.described})
    rng = np.random.default_rng(0)

    def moved(x):
        change = 0.05 * rng.normal(size=x.shape)
        return x + jax.device_put(change.astype(x.dtype), x.sharding)

    with jax.set_mesh(planned.mesh):
        state = fit.create(planned)
        params = jax.tree.map(moved, state.train.params)
    train = dataclasses.replace(state.train, params=params)
    manager = checkpoint.open_manager(folder, keep=1, every=1)
    checkpoint.save(manager, 1, dataclasses.replace(state, train=train), "{}", force=True)
    checkpoint.close(manager)


def policy_config(start, reward, rank=0, **changes):
    """PRIME from a folder; short completions are right."""
    config = ppo_tiny.get_config()
    config.model = dict(init_from=start, remat="none", lora_rank=rank)
    config.value.init_from = "policy"
    config.data.update(name="inline", max_prompt=8, template="{prompt}")
    config.data.options = dict(prompt=tuple(f"{i}+1=" for i in range(8)))
    config.rollout.update(prompts=4, max_tokens=6)
    steps = dict(learning_rate=1e-3, eps=1e-5)
    short = dict(name="length", weight=1.0, per_token=-1.0, free=3)
    implicit = dict(name="implicit_model", weight=1.0, init_from=reward, label="short")
    implicit |= dict(threshold=-0.5, optimizer=steps)
    config.rewards = ConfigDict(dict(short=short, implicit=implicit))
    config.algorithm = dict(name="prime")
    config.updates.minibatches = 1
    config.train.steps = 3
    config.checkpoint.every = 2
    for path, value in changes.items():
        put(config, path.replace("__", "."), value)
    return config


def began(config):
    """The state of the implicit reward at step 0, and the plan."""
    plan = make_plan(config)
    before = jax.live_arrays()
    with jax.set_mesh(plan.mesh):
        run, state = policy_run.start(plan)
    gc.collect()
    # Of the run's arrays only the state is left: it has all parameters, and has them once.
    known = {id(x) for x in (*before, *jax.tree.leaves(state))}
    rest = [x.shape for x in jax.live_arrays() if id(x) not in known]
    assert not rest, rest
    with pytest.raises(RuntimeError, match="implicit_model gave its parameters away"):
        run.rewards["device"].init()
    return state.rewards["device"]["implicit"], state, plan


def test_a_model_and_what_it_started_from_are_two_trees(folders):
    learner, _, plan = began(policy_config(folders["start"], folders["whole"]))
    assert learner.keys() == {"params", "reference", "optimizer"}
    with jax.set_mesh(plan.mesh):
        start, trained = (roles.load(folders[n], plan.mesh, RULES) for n in ("start", "whole"))
    assert same(learner["reference"], start) and same(learner["params"], trained)
    assert not same(start, trained)

    def beside(folder, **changes):
        """The reference of what a folder holds, and the β that it was trained with."""
        changes = {f"rewards__implicit__{key}": value for key, value in changes.items()}
        config = policy_config(folders["start"], folder, **changes)
        section, described = config.rewards.implicit, plan.described["reward/implicit"]
        with jax.set_mesh(plan.mesh):
            asked = (section, described, trained, plan.mesh, RULES)
            return implicit_start.load_reference(*asked), implicit_start.trained_beta(section)

    named, beta = beside(folders["start"], reference=folders["whole"])
    assert same(named, trained) and beta == {}
    based, beta = beside(folders["adapters"])  # merged: what lay under them is the reference
    assert same(based, start) and beta == {"beta": BETA}
    itself, _ = beside(folders["start"])
    assert same(itself, trained)  # whatever the model starts as


@pytest.mark.parametrize("reward", [pytest.param("adapters", marks=pytest.mark.slow), ""])
def test_adapters_share_the_policys_base(folders, reward):
    """Trained ones, and fresh ones of a model that starts where the policy does."""
    folder = folders.get(reward, "")
    learner, state, plan = began(policy_config(folders["start"], folder, rank=2))
    assert learner.keys() == {"params", "lent_base", "optimizer"} and learner["lent_base"] == {}
    leaves = jax.tree_util.tree_leaves_with_path(learner["params"])
    assert {path[-1].key for path, _ in leaves} == {"lora_a", "lora_b"}
    assert any(np.any(x) for path, x in leaves if path[-1].key == "lora_b") == bool(reward)
    with jax.set_mesh(plan.mesh):
        assert same(state.reference, roles.load(folders["start"], plan.mesh, RULES))


def test_a_model_that_starts_where_the_policy_does_needs_no_second_base(folders):
    config = policy_config(folders["start"], folders["start"] + "/.", rank=2)
    assert implicit_start.on_policy_base(config.rewards.implicit, config.model)
    assert make_plan(config).described["reward/implicit"].lora_rank == 2
    for start, rank in (("start", 0), ("whole", 2), ("adapters", 2)):
        config = policy_config(folders["start"], folders[start], rank=rank)
        assert not implicit_start.on_policy_base(config.rewards.implicit, config.model)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_goes_on_as_if_it_had_not_stopped(folders, tmp_path, monkeypatch, rank):
    config = policy_config(folders["start"], folders["adapters" if rank else "whole"], rank=rank)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    started = compiling.remember_runs(monkeypatch)
    last = train_policy(config, str(whole))
    for steps in (2, 3):
        config.train.steps = steps
        again = train_policy(config, str(parts))
    for run in started:
        assert set(compiling.times_compiled(run).values()) == {1}
    assert same(last.train.params, again.train.params)
    assert same(last.rewards, again.rewards)
    assert lines(whole)[-1] == lines(parts)[-1]
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert first["reward/implicit"] != 0.0 and first["reward/implicit/skipped"] == 0.0
    assert first["reward/implicit/skipped_in_row"] == 0.0
    assert first["reward/implicit/loss"] > 0 and first["reward/implicit/grad_norm"] > 0
    assert 0 <= first["reward/implicit/right"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["whole", "adapters"])
def test_evaluation_says_what_the_scoring_step_says(folders, reward):
    """By the same code, with the reference and the β of the run; adapters are merged."""
    config = policy_config(folders["start"], folders[reward], **FROZEN)
    plan = make_plan(config)
    with jax.set_mesh(plan.mesh):
        run, state = policy_run.start(plan)
        rollouts = run.sample(state, 0, jax.random.key(0))
        scores, _ = run.steps.score(state.rewards["device"], rollouts)
        ours = np.asarray(scores.parts["implicit"])
    assert run.steps.update_rewards is None
    judge = make_learned("implicit", config)(PolicySampler(config, Purpose.EVALUATE))
    np.testing.assert_allclose(judge(rollouts), ours, rtol=0, atol=1e-6)
    section = config.rewards.implicit
    with jax.set_mesh(plan.mesh):
        described = plan.described["reward/implicit"]
        asked = (described, {}, plan.mesh, RULES)
        model = decoder(described, RULES)
        params = roles.load(folders[reward], plan.mesh, RULES)
        said = [
            evaluate_completions(model, tree, {}, rollouts, temperature=1.0, rows=None).logprobs
            for tree in (params, implicit_start.load_reference(section, *asked))
        ]
    wanted = BETA * np.asarray(said[0] - said[1]).sum(axis=1)
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(rewards__implicit__label=KeyError), "rewards.implicit.optimizer is set, but no"),
        (FROZEN | dict(rewards__implicit__init_from=""), "rewards.implicit.init_from is empty"),
        (FROZEN, "rewards.implicit.init_from='.*' has no reference of its own"),
    ],
)
def test_evaluation_refuses_what_does_not_judge(folders, changes, said):
    config = policy_config(folders["start"], folders["start"], **changes)
    with pytest.raises(ValueError, match=said):
        make_learned("implicit", config)


BAD = [
    (dict(rewards__implicit__label="shrt"), "rewards.implicit.label='shrt'; did you mean 'short'"),
    (dict(rewards__implicit__label="implicit"), "rewards.implicit.label='implicit'; wanted the"),
    (
        dict(rewards__implicit__optimizer=KeyError),
        "rewards.implicit.label='short' says what a model",
    ),
    (FROZEN, "rewards.implicit.init_from='.*' has no reference of its own"),
    (dict(rewards__implicit__optimizer__rate=1.0), "rewards.implicit.optimizer.rate: no such key"),
    (dict(rewards__implicit__reference="no"), "rewards.implicit.reference: .*no"),
    (dict(rewards__short__reference="no"), "rewards.short.reference is set, but length has no use"),
    (dict(rewards__short__optimizer=dict()), "rewards.short.optimizer is set, but length has no"),
    (dict(rewards__implicit__beta="x"), "rewards.implicit.beta='x' is str; wanted float"),
    (dict(algorithm=dict(name="grpo", credit="steps")), "set its per='step'"),
    (dict(rewards__implicit__weight=0.0), "prime with these keys trains on scores of steps"),
    (dict(rewards__implicit__normalise=True), "rewards.implicit.normalise holds the spread"),
    (FROZEN | dict(rewards__implicit__reference="START"), "reference='.*' is what the model"),
    (
        FROZEN | dict(rewards__implicit__reference="START", rewards__implicit__init_from=""),
        "rewards.implicit.reference='.*' is what the model starts from, and beside itself a model",
    ),
    *(
        ({f"rewards__implicit__{key}": value}, f"implicit.{key} .* implicit_model has none; leave")
        for key, value in (
            ("length_penalty", dict(tokens=8)), ("scale", dict(limit=1.0)),
            ("relative", dict(answers="prompt")), ("clip", 3.0), ("shrink", 0.5),
        )
    ),
    (
        dict(
            rewards__implicit__name="rlhf_jax.rewards.implicit_model",
            rewards__implicit__relative=dict(answers="prompt"),
        ),
        "rewards.implicit.relative holds scores of reference answers",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_what_cannot_be_is_refused_when_it_is_planned(folders, changes, said):
    changes = {k: folders["start"] if v == "START" else v for k, v in changes.items()}
    config = policy_config(folders["start"], folders["start"], **changes)
    with pytest.raises(ValueError) as error:
        make_plan(config)
    assert re.search(said, str(error.value)), error.value


@pytest.mark.parametrize("loss", ["sigmoid_norm", "ipo"])
def test_what_was_trained_on_means_over_tokens_needs_a_beta(folders, tmp_path, loss):
    """One of the sum: the reward pays each token."""
    folder = shutil.copytree(folders["whole"], tmp_path / loss)
    saved = pathlib.Path(folder, "config.json")
    written = json.loads(saved.read_text())
    written["dpo"]["loss"] = loss
    saved.write_text(json.dumps(written))
    config = policy_config(folders["start"], str(folder), **FROZEN)
    with pytest.raises(ValueError, match=f"dpo.loss='{loss}', whose beta=0.2 is of the mean.*Set"):
        make_plan(config)
    config.rewards.implicit.beta = 0.02
    make_plan(config)


def test_the_models_schedule_has_no_steps_in_which_the_critic_trains_alone(monkeypatch):
    lengths = []
    monkeypatch.setattr(
        implicit_start.build, "optimizer", lambda _, s, steps: lengths.append(steps)
    )
    monkeypatch.setattr(implicit_start, "make_learner", lambda *_: None)
    monkeypatch.setattr(implicit_start, "load_reference", lambda *_: None)
    config = policy_config("", "", train__steps=10)
    model, mesh = decoder(tiny.config(), RULES), tiny.one_device()
    for pretrain, wanted in ((None, 10), (dict(steps=4), 6)):
        if pretrain is not None:
            config.value.pretrain = pretrain
        implicit_start.check(config, "implicit", model.config, translated=False)
        implicit_start.resources(config, "implicit", model, {}, mesh, RULES)
        assert lengths[-2:] == [wanted, wanted]
