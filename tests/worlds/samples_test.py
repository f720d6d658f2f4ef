"""Samples per prompt, the reward model's quality and the policy's start: what each is worth.

The findings of "Does RLHF Scale?" (Hou et al. 2024, https://arxiv.org/abs/2412.06000) in the world
of `bandit.Linear`, by the shipped GRPO (no KL, both clips 0.2) for 80 steps of 32 prompts. The
proxy's weights correlate with the gold's by rho, and each score has noise of standard deviation 1.
Gains in expected gold on new prompts, means over 16 seeds (their noise, 0.2, is the norm of the
gold, which all columns share):

    samples K        2       4       8      16      32      (rho 0.8)
                  2.53    2.88    2.99    3.03    3.05
    rho            0.5    0.65     0.8     0.9    0.97      (K 8)
     policy       1.90    2.45    2.99    3.33    3.57
     best of 16   1.63    2.11    2.59    2.89    3.10
    start            0    0.25     0.5       1       2      (K 8, rho 0.8; times the gold's weights)
                  2.99    2.11    1.28    0.24   -0.08

Rules: gain(8) > gain(2) + 0.2, and from 16 to 32 it grows by less than a quarter of what it grows
by from 2 to 4 (0.03 against 0.35). Policy and best-of-n grow with rho. The gain falls with the
strength of the start, to 0.2 at most. That policies gain less from a better reward model than
best-of-n does, which the paper reports, this world does not show, and nothing here claims it.
"""

import functools
import itertools

import jax
import numpy as np

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.ops.reward_metrics import best_of_k
from tests.worlds.bandit import (
    LINEAR,
    NEW_PROMPTS,
    RATE,
    Plan,
    keys,
    linear_worlds,
    start_at,
    table_reward,
    table_state,
    trainer,
)

SEEDS, NOISE = 16, 1.0
SAMPLES = (2, 4, 8, 16, 32)
QUALITIES = (0.5, 0.65, 0.8, 0.9, 0.97)
STARTS = (0.0, 0.25, 0.5, 1.0, 2.0)


@functools.cache
def program(samples):
    """(worlds, keys, rho, strength of the start) -> gains [seeds]."""
    algorithm = grpo(kl_coef=0.0, clip_low=0.2, clip_high=0.2)
    run = trainer(LINEAR, algorithm, table_reward(), Plan(samples=samples))

    def one(world, key, rho, strength):
        to_score, to_run = jax.random.split(key)
        start = start_at(strength * world.gold)
        state = table_state(world.table(world.proxy(rho)), to_score, NOISE)
        trained = run(world, start, state, {"policy": RATE, "value": 0.0}, to_run)
        return world.gain(trained.params["policy"], start["policy"])

    return jax.jit(jax.vmap(one, (0, 0, None, None)))


@functools.cache
def worlds():
    return linear_worlds(SEEDS)


@functools.cache
def gain(samples=8, rho=0.8, strength=0.0):
    return float(np.mean(program(samples)(worlds(), keys(SEEDS), rho, strength)))


@functools.cache
def best_of_16(rho):
    """The gain of the best of 16 answers to new prompts, scored with the same noise."""
    found = []
    for seed in range(SEEDS):
        world = jax.tree.map(lambda x, seed=seed: x[seed], worlds())
        rng = np.random.default_rng((seed, 1))
        answers = rng.integers(0, world.new.shape[1], (NEW_PROMPTS, 32))
        drawn = world.new[np.arange(NEW_PROMPTS)[:, None], answers]
        gold = drawn @ world.gold
        scores = drawn @ np.asarray(world.proxy(rho)) + NOISE * rng.normal(size=gold.shape)
        found.append(best_of_k(scores, gold, (16,))[0] - (world.new @ world.gold).mean())
    return float(np.mean(found))


def test_more_samples_help_and_then_hardly():
    found = {samples: gain(samples) for samples in SAMPLES}
    assert found[8] > found[2] + 0.2, found
    assert found[32] - found[16] < 0.25 * (found[4] - found[2]), found


def test_a_better_reward_model_is_better_for_policies_and_for_best_of_n():
    for how in (lambda rho: gain(rho=rho), best_of_16):
        found = [how(rho) for rho in QUALITIES]
        assert all(a < b for a, b in itertools.pairwise(found)), found


def test_a_stronger_start_gains_less():
    found = [gain(strength=strength) for strength in STARTS]
    assert all(a > b for a, b in itertools.pairwise(found)), found
    assert found[-1] <= 0.2, found
