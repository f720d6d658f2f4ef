"""A policy run that begins with the critic alone and whose controllers move: resumed, refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ppo_tiny import get_config
from rlhf_jax import policy_run, sections, train_policy
from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.online_dpo import online_dpo
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.controls import Controls, ReferenceControl, compile_reference, make_controls
from rlhf_jax.models.config import named_size
from rlhf_jax.policy_plan import Pretraining, make_pretraining, optimizers
from tests import compiling
from tests.run_test import assert_same_run, lines, summary

TINY = named_size("tiny")
OWN = {"policy": TINY, "value": TINY}


def small(**fields):
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def pretrained(steps, **fields):
    config = small(**fields)
    with config.unlocked():
        config.value.pretrain = dict(steps=steps)
    return config


def test_without_the_key_there_is_no_pretraining():
    assert make_pretraining(small(), ppo(), OWN) == Pretraining(0, None)


def test_the_critic_learns_whole_returns_and_the_policy_keeps_its_lambda():
    config = pretrained(3)
    sections.check("train_policy", config)
    made = make_pretraining(config, ppo(), OWN)
    assert made.steps == 3 and made.algorithm.needs == ppo().needs
    # An algorithm without `value_lam` has whole returns already.
    config.algorithm = dict(name="pe_reinforce")
    assert make_pretraining(config, ppo(), OWN).steps == 3


@pytest.mark.parametrize(
    ("steps", "algorithm", "described", "message"),
    [
        (3, grpo(), OWN, "value.pretrain trains a critic, and ppo has none; leave it out"),
        (3, ppo(), {"policy": TINY}, "take 'value' out of model.score_heads, or leave value.pret"),
        (12, ppo(), OWN, r"value.pretrain.steps=12 of train.steps=12 leave none for the policy"),
    ],
)
def test_a_pretraining_that_cannot_be_is_refused(steps, algorithm, described, message):
    with pytest.raises(ValueError, match=message):
        make_pretraining(pretrained(steps), algorithm, described)


def test_bad_keys_of_it_are_named():
    with pytest.raises(ValueError, match=r"value.pretrain.steps=0; wanted 1 or more"):
        sections.check("train_policy", pretrained(0))
    config = pretrained(2)
    with config.unlocked():
        config.value.pretrain.lam = 1.0
    with pytest.raises(ValueError, match=r"value.pretrain.lam: no such key"):
        sections.check("train_policy", config)


def test_a_schedule_has_the_steps_in_which_its_role_trains():
    """Linear to 0: the policy's ends as late as the critic's, that many steps after its start."""
    config = small()
    for role in ("policy", "value"):
        config.optimizer[role] = dict(learning_rate=1.0, schedule="linear", warmup=0, eps=1e-5)
    config.train.steps, config.updates.minibatches = 10, 1
    made = optimizers(config, ("policy", "value"), pretrain=4)
    one = {"w": jnp.ones(())}
    state = {role: made[role].init(one) for role in made}
    rates = {role: [] for role in made}
    for _ in range(6):
        for role, optimizer in made.items():
            update, state[role] = optimizer.update(one, state[role], one)
            rates[role].append(float(update["w"]))
    assert rates["policy"][3] == pytest.approx(rates["policy"][0] * 3 / 6, rel=1e-3)
    assert rates["value"][3] == pytest.approx(rates["value"][0] * 7 / 10, rel=1e-3)


# Controllers

TINY_RUN = dict(policy=TINY, rollouts=32)


def controlled(**controllers):
    config = small()
    with config.unlocked():
        config.controllers = controllers
    return config


def test_without_the_key_nothing_is_controlled():
    assert make_controls(small(), ppo(), **TINY_RUN) == Controls(None, None)


def test_controllers_are_as_they_were_said():
    config = controlled(kl_coef=dict(target=6.0, horizon=3200), reference=dict(every=4, decay=0.9))
    sections.check("train_policy", config)
    made = make_controls(config, ppo(kl_coef=0.1), **TINY_RUN)
    assert made.kl_coef == ((0.1, math.inf), 6.0, 3200, 32)
    assert made.reference == (4, 0.9)
    assert (
        make_controls(controlled(reference=dict(every=4)), ppo(), **TINY_RUN).reference.decay == 0
    )


LORA = dataclasses.replace(TINY, lora_rank=2)
HALF = dataclasses.replace(TINY, param_dtype="bfloat16")
KL = dict(target=6.0, horizon=3200)


@pytest.mark.parametrize(
    ("controllers", "algorithm", "policy", "message"),
    [
        (dict(kl_coef=KL), ppo(kl_coef=0.0), TINY, "as configured has none; set algorithm.kl_coef"),
        (dict(kl_coef=KL), online_dpo(), TINY, "changes the kl_coef of an algorithm, and ppo as"),
        (dict(kl_coef=KL | dict(target=0.0)), ppo(), TINY, r"kl_coef.target=0.0; wanted nats per"),
        (dict(kl_coef=KL | dict(horizon=31)), ppo(), TINY, "horizon=31 is less than the 32 comple"),
        (dict(reference=dict(every=1)), ppo(kl_coef=0.0), TINY, "has none; give it a KL term, or"),
        (dict(reference=dict(every=1)), ppo(), LORA, "lora_rank=2 is the frozen base under the ad"),
        (dict(reference=dict(every=1, decay=1.0)), ppo(), TINY, r"decay=1.0; wanted 0 \(a reset\)"),
        (dict(reference=dict(every=1, decay=0.9)), ppo(), HALF, "'bfloat16' rounds away; set it t"),
    ],
)
def test_a_controller_that_cannot_work_is_refused(controllers, algorithm, policy, message):
    config = controlled(**controllers)
    sections.check("train_policy", config)
    with pytest.raises(ValueError, match=message):
        make_controls(config, algorithm, policy, 32)


def test_a_reset_is_as_good_in_half_precision():
    assert make_controls(controlled(reference=dict(every=2)), ppo(), HALF, 32).reference.every == 2


@pytest.mark.parametrize(
    ("controllers", "message"),
    [
        (dict(kl_coef=dict(target=6.0)), "controllers.kl_coef.horizon is missing"),
        (dict(reference=dict(every=0)), "controllers.reference.every=0; wanted 1 or more"),
        (dict(referense=dict(every=1)), "controllers.referense: no such key; did you mean 'refer"),
    ],
)
def test_bad_keys_of_controllers_are_named(controllers, message):
    with pytest.raises(ValueError, match=message):
        sections.check("train_policy", controlled(**controllers))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_moved_reference_outlives_the_policy_that_it_was(decay):
    """Its buffers are its own: the next update donates the policy's. A head is no part of it."""
    policy = {"trunk": jnp.arange(4.0), "heads": {"value": jnp.ones(2)}}
    reference = {"trunk": jnp.full(4, 2.0)}
    move = compile_reference(ReferenceControl(1, decay), reference)
    reference = move(reference, policy)
    jax.jit(lambda x: x + 1, donate_argnums=0)(policy["trunk"])
    assert policy["trunk"].is_deleted()
    assert reference.keys() == {"trunk"}
    wanted = decay * 2.0 + (1 - decay) * np.arange(4.0)
    np.testing.assert_array_equal(reference["trunk"], wanted)


# A run with all of it; tests/mismatch_run_test.py resumes controllers in the ordinary suite.

STEPS, PRETRAIN, EVERY = 8, 3, 2


def everything():
    """A small PPO run whose critic trains alone for 3 steps; then β and the reference move."""
    config = small()
    config.model = dict(name="tiny", init_from="", layers=1, remat="none")
    config.rewards = dict(
        likes=dict(name="tests.toys.likes", weight=1.0, token=5),
        exact=dict(name="exact_match", weight=0.0),  # on the host
    )
    config.algorithm = dict(name="ppo", kl_coef=0.2, lam_alpha=0.5, value_lam=1.0)
    config.value.init_from = "policy"
    config.rollout.max_tokens = 8
    config.train.steps, config.checkpoint.every = STEPS, 2
    config.optimizer.policy.learning_rate = 5e-3
    with config.unlocked():
        config.value.pretrain = dict(steps=PRETRAIN)
        config.controllers = dict(
            kl_coef=dict(target=0.05, horizon=64), reference=dict(every=EVERY, decay=0.5)
        )
        config.monitor = dict(proxy="likes", every=2, start=1)
    return config


class Killed(Exception):
    """In place of a signal, which would end the tests as well."""


def killed_in(step, config, folder):
    """A run that dies in a step, behind its last checkpoint."""
    iterate = train_policy.iterate

    def die(run, state, now):
        if now == step:
            raise Killed
        return iterate(run, state, now)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_policy, "iterate", die)
        train_policy.train_policy(config, str(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs: one whole, one killed in the pretraining and once more behind a moved reference."""
    root = tmp_path_factory.mktemp("runs")
    states, counted = [], {}
    with pytest.MonkeyPatch.context() as patch:
        started = compiling.remember_runs(patch)
        control = policy_run.PolicyRun.control

        def remember(run, state, step, metrics):
            before = jax.device_get((state.reference, state.train.params["policy"]))
            state, found = control(run, state, step, metrics)
            states.append((*before, jax.device_get(state.reference)))
            return state, found

        patch.setattr(policy_run.PolicyRun, "control", remember)
        train_policy.train_policy(everything(), str(root / "whole"))
        counted = compiling.times_compiled(started[0])
    killed_in(2 + 1, everything(), root / "parts")  # resumes at 2, the critic's last step
    killed_in(6 + 1, everything(), root / "parts")
    train_policy.train_policy(everything(), str(root / "parts"))
    return root, states, counted


@pytest.mark.slow
def test_stopped_in_every_phase_and_resumed_is_never_stopped(folders):
    root, _, _ = folders
    assert_same_run(root / "whole", root / "parts")
    assert summary(root / "parts")["resumed_at"] == 6


@pytest.mark.slow
def test_nothing_compiles_again_when_controllers_move(folders):
    _, _, counted = folders
    assert counted.keys() >= {"update_critic", "update", "adapt_kl_coef", "move_reference"}
    assert set(counted.values()) == {1}, counted


@pytest.mark.slow
def test_the_critic_trains_alone_and_then_everything_does(folders):
    root, _, _ = folders
    rows = lines(root / "whole", "metrics.jsonl")
    assert ["value/pretraining" in row for row in rows] == [True] * PRETRAIN + [False] * 5
    assert ["loss/policy" in row for row in rows] == [False] * PRETRAIN + [True] * 5
    assert all("value/explained_variance" in row for row in rows)
    # Samples of the first policy step are still those of the start.
    assert [row["objective/kl_ref"] for row in rows[: PRETRAIN + 1]] == [0.0] * (PRETRAIN + 1)
    assert abs(rows[PRETRAIN + 1]["objective/kl_ref"]) > 0
    assert all(row["rollout/staleness"] == 0 for row in rows)


@pytest.mark.slow
def test_the_watch_begins_with_the_policy(folders):
    """Its evaluations are of two steps of the policy each; what it says is their mean."""
    root, _, _ = folders
    rows = lines(root / "whole", "metrics.jsonl")
    seen = [row for row in rows if "monitor/proxy" in row]
    assert [row["step"] for row in seen] == [PRETRAIN + 1, PRETRAIN + 3]
    for row in seen:
        pair = [rows[row["step"] - 1], row]
        mean = np.mean([one["reward/likes"] for one in pair])
        assert row["monitor/proxy"] == pytest.approx(mean, abs=1e-6)


@pytest.mark.slow
def test_beta_follows_the_rule(folders):
    root, _, _ = folders
    rows = lines(root / "whole", "metrics.jsonl")[PRETRAIN:]
    beta, seen = np.float32(0.2), set()
    for row in rows:
        assert row["controller/kl_coef"] == pytest.approx(float(beta), rel=1e-6)
        error = min(max(row["objective/kl_ref"] / 0.05 - 1, -0.2), 0.2)
        beta, seen = beta * (1 + error * 32 / 64), seen | {float(np.sign(error))}
    assert seen == {-1.0, 1.0}  # else the test shows half of it


@pytest.mark.slow
def test_the_reference_is_the_moving_average_of_the_policy(folders):
    root, states, _ = folders
    rows = lines(root / "whole", "metrics.jsonl")[PRETRAIN:]
    assert [row["controller/reference_moved"] for row in rows] == [0, 1, 0, 1, 0]
    for row, (before, policy, after) in zip(rows, states, strict=True):
        for old, own, new in zip(*map(jax.tree.leaves, (before, policy, after)), strict=True):
            wanted = 0.5 * old + 0.5 * own if row["controller/reference_moved"] else old
            np.testing.assert_allclose(new, wanted, rtol=1e-6, atol=1e-8)
