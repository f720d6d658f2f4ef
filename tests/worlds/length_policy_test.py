"""What PPO does with reward models that learnt length, and with a reward of length alone.

The world is that of length_test.py, where a policy is the best that it can be at its distance from
the start. Here it is trained: 400 prompts have 40 responses each, a policy is a softmax of a linear
score of their 8 features, and the shipped PPO (its critic a constant, no whitening) maximises the
normalised score less the KL, coefficient 1, whose optimum is that tilt; 200 steps of 32 prompts
with 8 samples. Each of 2 seeds:

    reward model        NRG ratio     mean length    gain in quality    off the tilt
    plain pairs         0.28, 0.27    105 to 146        0.27, 0.25          0.01
    balanced pairs      0.99, 0.99    105 to 110        0.52, 0.52          0.01
    plain, KL of 3      0.25, 0.24    105 to 120        0.09, 0.09          0.00

Rules: with the reward model of plain pairs, within-length gain is below 0.4 of the gain, and length
grows by more than 25 %; with that of balanced pairs it is above 0.9, and the gain in hidden quality
more than 1.5 times as large. A KL coefficient of 3 in place of 1, one of the paper's remedies,
makes less of both.

LPPO of Singhal et al. 2023 (https://arxiv.org/abs/2310.03716), a reward of length alone, aims at 20
tokens. A policy that ends with chance 1/8 after each of up to 40 tokens, a table of 40 x 2 logits
with a critic of 40 values, goes from 7.6 ± 6.9 tokens to 20.0 ± 0.2 in 300 steps.

What the interventions do to a reward that likes length, in the same table with two kinds of tokens
before the end, good and plain: R = 0.1 · tokens + 0.3 · (good − plain), whose correlation with
length is 0.66 at the start; PPO with a KL coefficient of 0.05. Mean length, and how many of the
tokens are good, of each of 2 seeds:

    R as it is                                          35.6, 35.7 tokens    0.95, 0.94 good
    length_penalty (tokens 20, coef 2)                  24.0, 23.6           0.98, 0.97
    scale (0.3)                                         29.6, 29.2           0.64, 0.64
    KL of 0.15                                          34.4, 34.5           0.89, 0.89

Rules: the penalty makes completions shorter by a fifth and no worse, scaling shorter by a tenth. It
makes less of everything: rewards so small leave the policy near its start.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.ops.length_bias import length_gain
from rlhf_jax.rewards.base import device_reward, length_penalty, scale
from rlhf_jax.rewards.length import length
from rlhf_jax.rewards.reshape import normalise
from tests.worlds.bandit import Plan, Policy, keys, sample, table_reward, table_state, trainer
from tests.worlds.length_test import (
    FEATURES,
    PAIRS,
    PER_LENGTH,
    balanced,
    fitted,
    responses,
)

SEEDS, PROMPTS, ANSWERS = 2, 400, 40
PLAN = Plan(prompts=PROMPTS, per_step=32, steps=200)
RATE, CRITIC_RATE = 0.3, 0.3
MOST, TARGET = 40, 20


class Outcome(NamedTuple):
    ratio: float  # NRG / ΔR
    before: float  # mean length
    after: float
    quality: float  # gain
    off: float  # total variation from the tilt, the mean over prompts


def _logits(world, params, record):
    return (world[record] @ params["policy"])[:, None, :]


def _values(world, params, record):
    del world
    return jnp.broadcast_to(params["value"], (len(record), 1))


POLICY = Policy(_logits, _values)


@functools.cache
def program(coef):
    """(features [400 40 8], scores [400 1 40], key) -> weights of the policy [8]."""
    reward = normalise(table_reward())
    run = trainer(POLICY, ppo(kl_coef=coef, whiten=False), reward, PLAN)
    reference = Plan(per_step=PROMPTS, samples=ANSWERS)

    @jax.jit
    def trained(features, scores, key):
        to_score, to_sample, to_run = jax.random.split(key, 3)
        start = {"policy": jnp.zeros(FEATURES), "value": jnp.zeros(())}
        every = jnp.arange(PROMPTS)
        drawn = sample(POLICY, features, start, every, to_sample, reference)
        state = {**reward.init(), "inner": table_state(scores, to_score)}
        state = reward.calibrate(state, drawn)
        rates = {"policy": RATE / coef, "value": CRITIC_RATE}  # the KL's curvature grows with coef
        return run(features, start, state, rates, to_run).params["policy"]

    return trained


def outcome(seed, keep, coef) -> Outcome:
    rng = np.random.default_rng((seed, 1))
    mixing = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0]
    sides = [responses(rng, PAIRS, mixing) for _ in range(2)]
    gap = [a - b for a, b in zip(*sides, strict=True)]
    first = rng.random(PAIRS) < 1 / (1 + np.exp(-gap[1] - gap[0] / PER_LENGTH))
    lengths = [np.where(side, sides[0][0], sides[1][0]) for side in (first, ~first)]
    kept = balanced(*lengths) if keep == "balanced" else slice(None)
    weights = fitted(np.where(first[:, None], gap[2], -gap[2])[kept])
    long, quality, features = (
        x.reshape(PROMPTS, ANSWERS, *x.shape[1:]) for x in responses(rng, PROMPTS * ANSWERS, mixing)
    )
    scores = features @ weights
    policy = np.asarray(program(coef)(features, scores[:, None, :], jax.random.key(seed)))
    share = np.asarray(jax.nn.softmax(features @ policy))
    tilt = np.asarray(jax.nn.softmax((scores - scores.mean()) / scores.std() / coef))
    noise = rng.gumbel(size=(ANSWERS, *share.shape))  # as many samples after as before
    after = np.argmax(np.log(share) + noise, axis=-1)
    chosen = np.arange(PROMPTS)[None, :], after
    gain = length_gain(
        long.ravel(), scores.ravel(), long[chosen].ravel(), scores[chosen].ravel()
    )  # fmt: skip
    return Outcome(
        ratio=gain.ratio,
        before=float(long.mean()),
        after=float((share * long).sum(axis=-1).mean()),
        quality=float((share * quality).sum(axis=-1).mean() - quality.mean()),
        off=float(0.5 * np.abs(share - tilt).sum(axis=-1).mean()),
    )


@functools.cache
def outcomes(keep, coef=1.0):
    return [outcome(seed, keep, coef) for seed in range(SEEDS)]


def test_ppo_ends_at_the_tilt():
    for one in (*outcomes("all"), *outcomes("balanced")):
        assert one.off < 0.05, one


def test_a_reward_model_of_plain_pairs_makes_policies_longer():
    for one in outcomes("all"):
        assert one.ratio < 0.4, one
        assert one.after > 1.25 * one.before, one


def test_balanced_pairs_make_policies_better():
    for plain, mended in zip(outcomes("all"), outcomes("balanced"), strict=True):
        assert mended.ratio > 0.9, mended
        assert mended.quality > 1.5 * plain.quality, (plain, mended)


@pytest.mark.slow
def test_a_stronger_kl_makes_less_of_everything():
    for one, held in zip(outcomes("all"), outcomes("all", 3.0), strict=True):
        assert held.after - held.before < 0.5 * (one.after - one.before), (one, held)
        assert held.quality < one.quality, (one, held)


def _of_position(name):
    def table(world, params, record):
        del world
        return jnp.repeat(params[name][None], len(record), axis=0)

    return table


@functools.cache
def lengths_with_a_target():
    """(mean, standard deviation) of the tokens of completions, before training and after."""
    policy = Policy(_of_position("policy"), _of_position("value"), ends=(1,))
    plan = Plan(prompts=1, per_step=32, steps=300)
    reward = length(target=TARGET)
    run = trainer(policy, ppo(kl_coef=0.0), reward, plan)
    many = Plan(prompts=1, per_step=1, samples=1024)

    def one(key):
        to_run, *to_sample = jax.random.split(key, 3)
        start = {
            "policy": jnp.tile(jnp.log(jnp.array([7.0, 1.0])), (MOST, 1)),
            "value": jnp.zeros(MOST),
        }
        rates = {"policy": 20.0, "value": 5.0}
        after = run(None, start, reward.init(), rates, to_run).params
        found = []
        for params, own in zip((start, after), to_sample, strict=True):
            drawn = sample(policy, None, params, jnp.zeros(1, jnp.int32), own, many)
            tokens = drawn.mask.sum(axis=-1)
            found.append([tokens.mean(), tokens.std()])
        return jnp.array(found)

    return np.asarray(jax.jit(jax.vmap(one))(keys(SEEDS)))


def test_a_reward_of_length_alone_is_met():
    for (before, _), (after, spread) in lengths_with_a_target():
        assert before < 10 and abs(after - TARGET) < 1 and spread < 3, lengths_with_a_target()


def _likes_length(rollouts):
    good, plain = (
        jnp.sum(jnp.where(rollouts.mask, rollouts.tokens == kind, False), axis=-1)
        for kind in (0, 1)
    )
    return 0.1 * jnp.sum(rollouts.mask, axis=-1) + 0.3 * (good - plain)


@functools.cache
def lengths_under(intervention, coef=0.05):
    """(mean length, share of good tokens) after training, of each seed."""
    policy = Policy(_of_position("policy"), _of_position("value"), ends=(2,))
    reward = intervention(device_reward("likes", _likes_length))
    run = trainer(policy, ppo(kl_coef=coef), reward, Plan(prompts=1, per_step=32, steps=300))
    many = Plan(prompts=1, per_step=1, samples=2048)

    def one(key):
        to_run, to_sample = jax.random.split(key)
        start = {
            "policy": jnp.tile(jnp.log(jnp.array([3.5, 3.5, 1.0])), (MOST, 1)),
            "value": jnp.zeros(MOST),
        }
        after = run(None, start, reward.init(), {"policy": 5.0, "value": 5.0}, to_run).params
        drawn = sample(policy, None, after, jnp.zeros(1, jnp.int32), to_sample, many)
        good = jnp.sum(jnp.where(drawn.mask, drawn.tokens == 0, False))
        words = jnp.sum(jnp.where(drawn.mask, drawn.tokens < 2, False))
        return jnp.array([drawn.mask.sum(axis=-1).mean(), good / words])

    return np.asarray(jax.jit(jax.vmap(one))(keys(SEEDS)))


def _as_it_is(reward):
    return reward


def _penalised(reward):
    return length_penalty(reward, tokens=20, coef=2.0)


@pytest.mark.slow
def test_a_length_penalty_makes_completions_shorter_and_no_worse():
    plain, mended = lengths_under(_as_it_is), lengths_under(_penalised)
    assert np.all(mended[:, 0] < 0.8 * plain[:, 0]), (plain, mended)
    assert np.all(mended[:, 1] > plain[:, 1] - 0.01), (plain, mended)


@pytest.mark.slow
def test_scaling_makes_completions_shorter():
    plain, scaled = lengths_under(_as_it_is), lengths_under(scale)
    assert np.all(scaled[:, 0] < 0.9 * plain[:, 0]), (plain, scaled)
