"""Evaluation and update in one pass give what the two give one after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.auxiliary import rehearsed
from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.online_dpo import online_dpo
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.algorithms.reinforce_plus_plus import reinforce_plus_plus
from rlhf_jax.algorithms.wrappers import correction
from rlhf_jax.mesh import make_mesh
from rlhf_jax.training.experience import make_evaluate_step, make_experience
from rlhf_jax.training.monitor import batch_metrics
from rlhf_jax.training.one_pass import fits_one_pass, make_one_pass_step
from rlhf_jax.training.update import compile_update
from tests.training.tiny import (
    Setup,
    assert_close,
    assert_equal,
    config,
    host,
    rollouts,
    scores,
    texts,
)

CRITIC = config(lm_head=False, score_heads=("value",))
FOUR = {"data": 2, "tensor": 2}


def report(experience, entropy, step):
    return batch_metrics(experience, entropy, step, reference=True)


class OnePass(Setup):
    """A `Setup` whose update evaluates what it is given."""

    def __init__(self, algorithm, **changes):
        roles = ("policy", "value") if changes.get("value") else ("policy",)
        optimizers = {role: optax.sgd(0.1) for role in roles}
        super().__init__(algorithm, optimizers=optimizers, rows=8, **changes)
        around = dict(temperature=0.7, group_size=2)
        step = make_one_pass_step(self.models, algorithm, self.optimizers, **around, report=report)
        self.apart, self.at_once = self.update_step, compile_update(step, self.state, self.mesh)

    def without_passes(self, batch, kl_coef=None, extra=None):
        """What a run gives to such an update: no log-probs and no values."""
        step = make_evaluate_step(
            self.models, self.algorithm.needs, temperature=0.7, rows=8, trained=False
        )
        with jax.set_mesh(self.mesh):
            outputs = step(self.state.params, self.frozen, batch)
            assert outputs[0] is None and outputs[2] is None
            return make_experience(batch, scores(batch), *outputs, extra or {}, kl_coef)

    def both(self, batch, kl_coef=None, extra=None):
        """(metrics, new state) of evaluation and update, and of the one pass."""
        self.reset()
        experience = self.experience(batch, extra=extra)
        experience = dataclasses.replace(experience, kl_coef=kl_coef)
        self.update_step = self.apart
        two = self.update(experience), host(self.state)
        self.reset()
        self.update_step = self.at_once
        one = self.update(self.without_passes(batch, kl_coef, extra)), host(self.state)
        return two, one


@pytest.fixture(scope="module")
def actor_critic():
    return OnePass(ppo(kl_coef=0.1), value=CRITIC)


def assert_same(two, one):
    """The same step, and the same metrics beside those of the report."""
    assert_close(one[1], two[1], atol=2e-6)
    for name, (total, count) in two[0].items():
        np.testing.assert_allclose(one[0][name], (total, count), rtol=1e-4, atol=2e-6, err_msg=name)
    assert {"objective/kl_ref", "rollout/length"} <= one[0].keys() - two[0].keys()


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        (ppo(kl_coef=0.1), dict(policy=config(score_heads=("value",)))),  # a head on the trunk
        # Which tokens train depends on the log-probs.
        (correction(grpo(), how="token_mask", low=0.06, high=1.5), {}),
        pytest.param(grpo(kl_coef=0.04), {}, marks=pytest.mark.slow),
        pytest.param(online_dpo(), {}, marks=pytest.mark.slow),
        # Whitens over the batch what the log-probs say.
        pytest.param(reinforce_plus_plus(), {}, marks=pytest.mark.slow),
    ],
    ids=["ppo_on_trunk", "masking_correction", "grpo", "online_dpo", "reinforce_plus_plus"],
)
def test_one_pass_is_evaluation_and_update(algorithm, changes):
    setup = OnePass(algorithm, **changes)
    two, one = setup.both(rollouts(4, 2))
    assert_same(two, one)
    assert one[0]["update/first_logprob_gap"][0] == 0


def test_a_critic_of_its_own_learns_the_same(actor_critic):
    two, one = actor_critic.both(rollouts(4, 2), kl_coef=jnp.float32(0.3))
    assert_same(two, one)
    other, _ = actor_critic.both(rollouts(4, 2), kl_coef=jnp.float32(0.9))
    assert abs(other[0]["loss/value"][0] - two[0]["loss/value"][0]) > 1e-3
    assert one[0]["value/explained_variance"][0] != 0
    for name in ("policy/ratio", "policy/clip_fraction"):
        total, count = one[0][name]
        assert total / count == (name == "policy/ratio")
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one[1].params, host(actor_critic.params))
    assert min(max(jax.tree.leaves(moved[role])) for role in ("policy", "value")) > 1e-4


def test_auxiliary_rows_train_beside(actor_critic):
    setup = OnePass(rehearsed(grpo(), weight=0.5))
    rows = texts(4, 6)
    two, one = setup.both(rollouts(4, 2), extra={"rehearsal": rows})
    assert_same(two, one)
    assert one[0]["loss/rehearsal"][1] == rows.loss_mask.sum()


@pytest.mark.slow  # as those of update_test.py, which run always
def test_four_devices_give_the_numbers_of_one(actor_critic):
    batch = rollouts(4, 2)
    _, want = actor_critic.both(batch)
    _, got = OnePass(ppo(kl_coef=0.1), value=CRITIC, mesh=make_mesh(FOUR)).both(batch)
    assert_close(got[1], want[1], atol=1e-5)


def test_a_score_that_is_no_number_changes_nothing(actor_critic):
    setup = actor_critic
    setup.reset()
    setup.update_step = setup.at_once
    before = host(setup.state)
    experience = setup.without_passes(rollouts(4, 2))
    outcome = np.where(np.arange(8) == 3, np.nan, experience.scores.outcome).astype(np.float32)
    bad = dataclasses.replace(experience.scores, outcome=outcome)
    metrics = setup.update(dataclasses.replace(experience, scores=bad))
    assert metrics["update/skipped"] == (1, 1) and metrics["update/skipped_in_row"][0] == 1
    assert_equal(setup.state.params, before.params)
    assert_equal(setup.state.opt_state, before.opt_state)
    # The next batch trains again, with the same program.
    programs = setup.at_once._cache_size()
    metrics = setup.update(setup.without_passes(rollouts(4, 2, seed=3)))
    assert metrics["update/skipped_in_row"][0] == 0
    assert setup.at_once._cache_size() == programs


def test_only_batches_that_are_trained_on_once_and_whole_fit():
    parts = dict(epochs=1, minibatches=1, microbatches=1)
    assert fits_one_pass(**parts)
    for name in parts:
        assert not fits_one_pass(**parts | {name: 2})
