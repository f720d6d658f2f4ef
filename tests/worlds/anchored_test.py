"""REINFORCE with a KL anchor ends at the optimum of what it maximises, and nowhere else.

Sidahmed et al. 2024 (https://arxiv.org/abs/2403.10704) maximise (1 − β) r − β KL(π ‖ π_ref), whose
optimum is π_ref exp(r (1 − β)/β). Eight prompts with eight answers each, rewards and logits of the
reference normal, a policy and a critic that are tables, which the shipped algorithm trains for
1,500 steps of 16 prompts with 8 samples. Total variation from the optimum, and from π_ref exp(r/β)
where it would end without (1 − β), the greatest over prompts and 4 seeds:

    β                0.2     0.4     0.6
    optimum        0.017   0.002   0.000
    without (1−β)  0.148   0.327   0.523

Rule: below 0.05 for every prompt.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.pe_reinforce import pe_reinforce
from tests.worlds.bandit import Plan, Policy, keys, table_reward, table_state, trainer

COUNT, ANSWERS, SEEDS = 8, 8, 4
PLAN = Plan(prompts=COUNT, per_step=16, steps=1500)
RATES = {"policy": 8.0, "value": 2.0}


def of_prompt(part):
    return lambda world, params, record: params[part][record]


POLICY = Policy(of_prompt("policy"), of_prompt("value"))


@functools.cache
def ends(coef):
    """(share of each answer, reference's logits, rewards), all [seeds 8 8]."""
    run = trainer(POLICY, pe_reinforce(kl_coef=coef), table_reward(), PLAN)

    def one(key):
        *to_draw, to_score, to_run = jax.random.split(key, 4)
        worth, reference = (jax.random.normal(k, (COUNT, 1, ANSWERS)) for k in to_draw)
        start = {"policy": reference, "value": jnp.zeros((COUNT, 1))}
        after = run(None, start, table_state(worth, to_score), RATES, to_run).params["policy"]
        return jax.nn.softmax(after)[:, 0], reference[:, 0], worth[:, 0]

    return jax.jit(jax.vmap(one))(keys(SEEDS))


def farthest(coef, weight):
    """The greatest total variation between what training ended at and π_ref exp(weight · r)."""
    share, reference, worth = ends(coef)
    optimum = jax.nn.softmax(reference + weight * worth)
    return float(np.max(0.5 * np.abs(share - optimum).sum(axis=-1)))


@pytest.mark.parametrize("coef", [0.2, 0.4, 0.6])
def test_training_ends_at_the_optimum(coef):
    assert farthest(coef, (1 - coef) / coef) < 0.05
    assert farthest(coef, 1 / coef) > 0.05  # and not at that of r − β KL
