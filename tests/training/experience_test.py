"""Evaluation before the update: only the passes that are needed, in chunks, rows kept spread."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.mesh import make_mesh
from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.rewards.base import outcome_scores
from rlhf_jax.training.experience import compile_score, make_experience
from rlhf_jax.types import Algorithm, Needs
from tests.training.tiny import Setup, assert_close, assert_equal, config, host, rollouts, scores

CRITIC = config(lm_head=False, score_heads=("value",))


def needing(**needs):
    return Algorithm(init=lambda: (), targets=None, loss=None, needs=Needs(**needs))


@pytest.fixture(scope="module")
def setup():
    """Policy, reference and critic on four devices, in chunks of 4 of 8 rows."""
    return Setup(ppo(), mesh=make_mesh({"data": 2, "tensor": 2}), value=CRITIC, rows=4)


def test_each_pass_is_that_of_its_own_model(setup):
    batch = rollouts(4, 2)
    experience = setup.experience(batch)
    models, params = setup.models, host(setup.params)
    reference = host(setup.frozen["reference"])

    def one(model, tree):
        return evaluate_completions(model, tree, {}, batch, temperature=0.7, rows=None)

    assert_close(experience.logprobs, one(models.policy, params["policy"]).logprobs, atol=1e-5)
    assert_close(experience.ref_logprobs, one(models.reference, reference).logprobs, atol=1e-5)
    values = one(models.value, params["value"]).scores["value"]
    assert_close(experience.values, values, atol=1e-5)
    assert np.abs(host(experience.logprobs) - host(experience.ref_logprobs)).max() > 0.01


def test_rows_stay_spread_over_the_batch_axes_and_one_program_serves_all(setup):
    first = setup.experience(rollouts(4, 2, seed=1))
    setup.experience(rollouts(4, 2, seed=2))
    for leaf in (first.logprobs, first.ref_logprobs, first.values):
        assert leaf.sharding.spec == PartitionSpec("data")
    assert setup.evaluate_step._cache_size() == 1


def test_nothing_in_padding_matters(setup):
    batch = rollouts(4, 2)
    tokens = np.where(batch.mask, batch.tokens, 15).astype(np.int32)
    prompts = batch.prompts
    left = np.where(prompts.mask, prompts.tokens, 15).astype(np.int32)
    prompts = dataclasses.replace(prompts, tokens=left)
    other = dataclasses.replace(batch, tokens=tokens, prompts=prompts)
    given, changed = setup.experience(batch), setup.experience(other)
    for name in ("logprobs", "ref_logprobs", "values"):
        assert_equal(vars(given)[name], vars(changed)[name])


def test_a_step_refuses_to_run_outside_its_mesh(setup):
    with pytest.raises(ValueError, match="set_mesh"):
        setup.evaluate_step(setup.state.params, setup.frozen, rollouts(4, 2))


def test_passes_that_nobody_needs_are_skipped_and_read_as_zeros():
    setup = Setup(needing(), policy=config(score_heads=("value",)))
    batch = rollouts(4, 2)
    with jax.set_mesh(setup.mesh):
        policy, reference, value = setup.evaluate_step(setup.params, setup.frozen, batch)
    assert reference is None and value is None
    experience = make_experience(batch, scores(batch), policy, None, None, {})
    zeros = np.zeros(batch.tokens.shape, np.float32)
    assert_equal(experience.ref_logprobs, zeros)
    assert_equal(experience.values, zeros)
    # A value head on the trunk is the policy's own pass.
    experience = make_experience(batch, scores(batch), policy, None, policy, {})
    assert_equal(experience.values, policy.scores["value"])


def test_scoring_copies_no_leaf_of_the_state_that_it_leaves_alone():
    batch = rollouts(4, 2)
    state = {"params": jnp.arange(3.0), "seen": jnp.zeros((), jnp.int32)}

    def score(state, rollouts):
        outcome = jnp.sum(rollouts.mask, axis=-1) * state["params"][1]
        return outcome_scores("count", outcome, rollouts), {**state, "seen": state["seen"] + 1}

    step = compile_score(score)
    given, new = step(state, batch)
    given, newer = step(new, batch)
    np.testing.assert_array_equal(given.outcome, batch.mask.sum(-1))
    assert newer["params"] is state["params"] and int(newer["seen"]) == 2
    assert step.compiled._cache_size() == 1
