"""The critic alone: it learns a chain whose values are known, and nothing else moves."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.training.critic import make_critic_step
from rlhf_jax.training.update import compile_update
from rlhf_jax.types import Scores
from tests.training.tiny import Setup, assert_close, assert_equal, config, host, rollouts

CRITIC = config(layers=1, lm_head=False, score_heads=("value",))
PROMPTS, LENGTH, LAST = 16, 5, 15
WORTH = np.array([0.5, -1.0, 2.0, 0.25, -0.5, 1.0], np.float32)  # of the tokens 10 ... 15
SIZES = dict(epochs=1, minibatches=1, microbatches=1, temperature=0.7, group_size=1)


def chain(seed):
    """Completions that count up from the prompt's last token to 15, each token with its worth.

    Returns:
        rollouts, scores, and what every state is worth: V = Σ of the worths to come.
    """
    start = np.random.default_rng(seed).integers(10, LAST, PROMPTS)
    steps = np.arange(1, LENGTH + 1)
    tokens = np.minimum(start[:, None] + steps, LAST)
    mask = steps <= (LAST - start)[:, None]
    batch = rollouts(PROMPTS, 1, prompt_length=2, length=LENGTH)
    prompts = dataclasses.replace(
        batch.prompts,
        tokens=np.stack([start, start], 1).astype(np.int32),
        mask=np.array([[False, True]] * PROMPTS),
    )
    batch = dataclasses.replace(
        batch, prompts=prompts, tokens=np.where(mask, tokens, 0).astype(np.int32), mask=mask
    )
    process = np.where(mask, WORTH[tokens - 10], np.nan).astype(np.float32)
    scores = Scores(outcome=np.zeros(PROMPTS, np.float32), process=process, parts={})
    worth = np.array([[WORTH[t - 10 :].sum() for t in row] for row in tokens])
    return batch, scores, np.where(mask, worth, 0.0)


@pytest.fixture(scope="module")
def setup():
    made = Setup(
        ppo(kl_coef=0.0, value_lam=1.0, lam=0.0),
        policy=config(layers=1),
        value=CRITIC,
        group_size=1,
        optimizers={role: optax.adam(1e-2) for role in ("policy", "value")},
    )
    step = make_critic_step(made.models, made.algorithm, made.optimizers, **SIZES)
    made.critic_step = compile_update(step, made.state, made.mesh)
    return made


def train_critic(setup, experience):
    with jax.set_mesh(setup.mesh):
        setup.state, metrics = setup.critic_step(
            setup.state, setup.frozen, experience, jax.random.key(0)
        )
    return {name: float(mean.total) / float(mean.count) for name, mean in metrics.items()}


def test_a_chain_of_known_values_is_learnt_before_the_policy_moves(setup):
    setup.reset()
    before = host(setup.state)
    explained = []
    for seed in range(60):
        batch, scores, worth = chain(seed)
        experience = setup.experience(batch, scores)
        metrics = train_critic(setup, experience)
        explained.append(metrics["value/explained_variance"])
        assert metrics["value/pretraining"] == 1.0
    print(f"explained variance {explained[0]:.3f} -> {explained[-1]:.3f}")
    assert explained[0] < 0.5
    assert explained[-1] > 0.8
    # What it was told are whole returns, whatever λ the policy's advantages have.
    targets, _ = setup.algorithm.targets(experience, 1, ())
    np.testing.assert_allclose(targets.returns, worth, atol=1e-5)
    after = host(setup.state)
    for tree in ("params", "opt_state"):
        assert_equal(getattr(after, tree)["policy"], getattr(before, tree)["policy"])
    assert_equal((after.step, after.algorithm), (before.step, before.algorithm))
    assert set(metrics) == {
        *("value/explained_variance", "value/pretraining", "value/squared_error"),
        *("loss/value", "value/grad_norm"),
        *("update/loss", "update/skipped", "update/skipped_in_row", "update/terms_empty"),
    }
    assert setup.critic_step._cache_size() == 1


def test_it_is_the_critics_part_of_the_update(setup):
    """Policy and critic share no parameters: one step of both moves the critic as one alone."""
    setup.reset()
    experience = setup.experience(*chain(0)[:2])
    metrics = train_critic(setup, experience)
    alone = host(setup.state)
    setup.reset()
    both = setup.update(experience)
    assert_close(alone.params["value"], setup.state.params["value"], atol=1e-6)
    assert_close(alone.opt_state["value"], setup.state.opt_state["value"], atol=1e-6)
    total, count = both["loss/value"]
    assert metrics["loss/value"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["value/grad_norm"] == pytest.approx(both["value/grad_norm"][0], rel=1e-4)


def test_what_is_not_finite_is_skipped(setup):
    setup.reset()
    batch, scores, _ = chain(0)
    spoilt = dataclasses.replace(scores, outcome=np.full(PROMPTS, np.nan, np.float32))
    before = host(setup.state)
    metrics = train_critic(setup, setup.experience(batch, spoilt))
    assert metrics["update/skipped"] == metrics["update/skipped_in_row"] == 1.0
    assert_equal(setup.state.params, before.params)
    assert_equal(setup.state.opt_state, before.opt_state)


def test_without_a_critic_of_its_own_it_is_refused(setup):
    models = setup.models._replace(value=None)
    with pytest.raises(ValueError, match="head on the policy's trunk, which would not stay"):
        make_critic_step(models, setup.algorithm, setup.optimizers, **SIZES)
    with pytest.raises(ValueError, match="epochs=0; wanted 1 or more"):
        make_critic_step(
            setup.models, setup.algorithm, setup.optimizers, **(SIZES | dict(epochs=0))
        )
    other = grpo(kl_coef=0.0)
    other = other._replace(needs=setup.algorithm.needs)
    step = make_critic_step(setup.models, other, setup.optimizers, **SIZES)
    with (
        jax.set_mesh(setup.mesh),
        pytest.raises(ValueError, match=r"no term 'value' .*only policy"),
    ):
        jax.eval_shape(
            step, setup.state, setup.frozen, setup.experience(*chain(0)[:2]), jax.random.key(0)
        )
