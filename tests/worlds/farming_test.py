"""Can a policy earn step rewards by taking more steps?

A solution is up to 12 steps, each a remark that is true and leads nowhere, or an answer, right or
wrong, which ends it. A process model calls a remark right with 0.9, the right answer with 0.95 and
the wrong one with 0.2; beside it stands a verifier that pays 1 for the right answer. The policy, a
table of 12 x 3 logits, takes two steps on average and is right in half of what it ends; the shipped
GRPO trains it on the sum of the shipped process reward and the verifier's for 150 steps of 16
prompts with 8 samples. Measured, means over 8 seeds:

                     steps          right answers
    start             2.00               0.50
    delta             1.00               1.00
    prob_per_step     1.00               1.00
    prob             11.57               0.87
    centred          10.11               0.83
    logit            11.53               0.80

Rules: with "delta", the default, as with the mean over steps, solutions grow no longer and answers
right; with the sum of probabilities they grow to five times as many steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.rewards.base import combine, device_reward
from rlhf_jax.rewards.process_model import process_model
from tests.worlds.bandit import Plan, Policy, keys, sample, trainer
from tests.worlds.linear import linear_model

MOST, SEEDS, RATE = 12, 8, 3.0
REMARK, RIGHT, WRONG = 0, 1, 2
CALLED = np.array([0.9, 0.95, 0.2], np.float32)
START = np.tile(np.log(np.array([0.5, 0.25, 0.25], np.float32)), (MOST, 1))
PLAN = Plan(prompts=1, per_step=16, steps=150)


def logits(world, params, record):
    del world
    return jnp.tile(params["policy"], (len(record), 1, 1))


POLICY = Policy(logits, ends=(RIGHT, WRONG))


def is_right(rollouts):
    return jnp.any((rollouts.tokens == RIGHT) & rollouts.mask, axis=-1)


def rewarded(transform):
    """The sum of a process model that knows what each token is worth, and of the verifier."""
    says = (np.log(CALLED) - np.log1p(-CALLED))[:, None]
    head = {"process": {"kernel": jnp.ones(1), "bias": jnp.zeros(())}}
    judge = process_model(
        model=linear_model(1, ("process",)),
        params={"features": jnp.asarray(says), "heads": head},
        transform=transform,
    )
    return combine({"steps": (judge, 1.0), "right": (device_reward("right", is_right), 1.0)})


@functools.cache
def trained(transform):
    """(mean steps, share of right answers) before training and after it."""
    reward = rewarded(transform)
    run = trainer(POLICY, grpo(kl_coef=0.0), reward, PLAN)
    many = Plan(prompts=1, per_step=1, samples=512)

    def one(key):
        to_run, *to_sample = jax.random.split(key, 3)
        start = {"policy": jnp.asarray(START)}
        after = run(None, start, reward.init(), {"policy": RATE}, to_run).params
        found = []
        for params, own in zip((start, after), to_sample, strict=True):
            drawn = sample(POLICY, None, params, jnp.zeros(1, jnp.int32), own, many)
            found.append([drawn.mask.sum(axis=-1).mean(), is_right(drawn).mean()])
        return jnp.array(found)

    return np.asarray(jax.jit(jax.vmap(one))(keys(SEEDS))).mean(axis=0)


@pytest.mark.parametrize("transform", ["delta", "prob_per_step"])
def test_what_cannot_be_farmed_is_not(transform):
    (steps, right), (steps_after, right_after) = trained(transform)
    assert steps_after <= steps, trained(transform)
    assert right_after > 0.95 > 0.6 > right, trained(transform)


def test_the_sum_of_probabilities_is_farmed():
    (steps, _), (steps_after, _) = trained("prob")
    assert steps_after > 5 * steps, trained("prob")
