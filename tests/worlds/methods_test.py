"""PPO, GRPO and RLOO on the same samples, each at its best learning rate.

In the world of `bandit.Linear` (rho 0.8, noise 1): 80 steps of 32 prompts with 8 samples each,
rewards normalised by frozen statistics of the start, no KL. PPO has its critic, linear in a
prompt's features and trained by the shipped value term; its batch of advantages is whitened. Where
samples are used four times, RLOO's loss is the clipped one. Gains in gold, means over 16 seeds:

    rate             0.2     0.6       2
    1 epoch   PPO   1.78    3.01    3.46
              GRPO  1.65    2.99    3.46
              RLOO  1.76    2.96    3.40
    4 epochs  PPO   3.17    3.48    3.60
              GRPO  3.17    3.49    3.60
              RLOO  3.11    3.43    3.57

Rule: at each method's best rate the gains lie within 5 % of each other, with one epoch and with
four. (At a rate of 6 too: 3.55 to 3.59, and 3.62 to 3.64.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.algorithms.rloo import rloo
from rlhf_jax.rewards.reshape import normalise
from tests.worlds.bandit import (
    WITH_CRITIC,
    Plan,
    keys,
    linear_worlds,
    sample,
    start_at,
    table_reward,
    table_state,
    trainer,
)

SEEDS, NOISE, RHO = 16, 1.0, 0.8
RATES, CRITIC_RATE = (0.2, 0.6, 2.0), 0.3


def method(name, epochs):
    if name == "ppo":
        return ppo(kl_coef=0.0)
    if name == "grpo":
        return grpo(kl_coef=0.0, clip_low=0.2, clip_high=0.2)
    return rloo(kl_coef=0.0, form="reinforce" if epochs == 1 else "clip")


@functools.cache
def gains(name, epochs):
    """The mean gain for each rate."""
    reward = normalise(table_reward())
    run = trainer(WITH_CRITIC, method(name, epochs), reward, Plan(epochs=epochs))
    reference = Plan(per_step=512)

    def one(rate, world, key):
        to_score, to_sample, to_run = jax.random.split(key, 3)
        start = start_at()
        table = table_state(world.table(world.proxy(RHO)), to_score, NOISE)
        drawn = sample(
            WITH_CRITIC, world, start, jnp.arange(reference.per_step), to_sample, reference
        )
        state = reward.calibrate({**reward.init(), "inner": table}, drawn)
        rates = {"policy": rate, "value": CRITIC_RATE}
        return world.gain(run(world, start, state, rates, to_run).params["policy"])

    every = jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None))
    found = jax.jit(every)(jnp.asarray(RATES), linear_worlds(SEEDS), keys(SEEDS))
    return np.asarray(found).mean(axis=1)


@pytest.mark.parametrize("epochs", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_methods_reach_the_same_gold(epochs):
    best = {name: float(gains(name, epochs).max()) for name in ("ppo", "grpo", "rloo")}
    assert max(best.values()) < 1.05 * min(best.values()), best
