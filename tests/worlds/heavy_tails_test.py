"""Scores with a heavy negative tail: normalised by frozen statistics, clipped or shrunk.

In the world of `bandit.Linear` (rho 0.8, K 8, noise 1), from the first step of training on, a tenth
of the scores lose tail · Exp(1): a reward model that breaks on some of what the policy writes. The
shipped `normalise` has its statistics from 4,096 completions of the start, without the tail;
`clip` holds scores within 3 and `shrink` multiplies negative ones. The advantage is the shaped
score less the group's mean (the shipped GRPO without its scale). Gains in gold, means over 16
seeds:

{table}

Rules: at a tail of 600 without a clip, shrinking to 0.1 gains 1.0 more than not shrinking; with the
clip, gains lie within 0.2 of each other however much is shrunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.rewards.reshape import clip, normalise, shrink
from tests.worlds.bandit import (
    LINEAR,
    RATE,
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
BROKEN, LIMIT = 0.1, 3.0
SHRUNK = (1.0, 0.5, 0.2, 0.1)


def breaking(reward):
    """The reward, of which a tenth of the scores lose ``state["tail"]`` · Exp(1)."""

    def score(state, rollouts):
        scores, inner = reward.score(state["inner"], rollouts)
        key = jax.random.fold_in(inner["key"], 1)
        broken = jax.random.bernoulli(key, BROKEN, scores.outcome.shape)
        loss = state["tail"] * jax.random.exponential(key, scores.outcome.shape)
        outcome = scores.outcome - jnp.where(broken, loss, 0.0)
        return scores.replace(outcome=outcome), {**state, "inner": inner}

    return reward._replace(score=score)
