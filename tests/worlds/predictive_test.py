"""Do the metrics of a reward model foretell what it is good for?

After "How to Evaluate Reward Models for RLHF" (Frick et al. 2024, https://arxiv.org/abs/2410.14872)
in the world of `bandit.Linear`. Twelve reward models of each seed are trained by the shipped
trainer (ridge 1e-3) on 30 to 5,000 pairs of answers, 0 to 40 % of the labels flipped and 0 to 40 %
of the features hidden from the model. Each is asked for the better of 2,000 new pairs (accuracy)
and for the best third of the answers to new prompts (AUC), chooses the best of 16, and is what the
shipped GRPO trains for (80 steps, K 8). Pearson's correlation of metric and gain over the twelve,
the least and the greatest of 8 seeds:

                  best of 16           GRPO
    accuracy    0.953 to 0.985    0.956 to 0.988
    AUC         0.985 to 0.998    0.994 to 0.999

The lowest end of an interval is 0.924.

Rule: each is at least 0.9 in every seed, and the 95 % interval of a bootstrap over the models
excludes 0. Real reward models differ in bias, not only in noise and in what they see: there the
paper found 0.77. That the worst category foretells more than the mean is not tested.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.ops.length_bias import correlation
from rlhf_jax.ops.reward_metrics import best_of_k, bootstrap_interval, pair_accuracy, prompt_aucs
from rlhf_jax.training.objective import first_rows
from tests.worlds.bandit import (
    ANSWERS,
    LINEAR,
    NEW_PROMPTS,
    RATE,
    WIDTH,
    Plan,
    keys,
    linear_worlds,
    start_at,
    table_reward,
    table_state,
    trainer,
)
from tests.worlds.linear import linear_model, pairs, zero_heads
from tests.worlds.linear import trainer as reward_trainer

SEEDS, MODELS = 8, 12
FEWEST, MOST, FLIPPED, HIDDEN, RIDGE = 30, 5000, 0.4, 0.4, 1e-3
NEW_PAIRS, BEST_SHARE = 2000, 1 / 3
METRICS, USES = ("accuracy", "auc"), ("best_of_16", "grpo")


def two_answers(rng, features, count):
    """Features [2 count 12] of two answers to the same prompt, of so many prompts."""
    prompt = rng.integers(0, len(features), count)
    return features[prompt, rng.integers(0, ANSWERS, (2, count))]


@functools.cache
def fit():
    """(answers [2 · 5000, 12], labels, how many of the pairs count) -> weights [12]."""
    heads = ("outcome",)
    model = linear_model(WIDTH, heads)
    train = reward_trainer(model, zero_heads(WIDTH, heads), {"pairs": 1.0}, RIDGE)
    first, second = np.split(np.arange(2 * MOST), 2)

    def fitted(answers, label, count):
        mixture = first_rows({"pairs": pairs(first, second, label)}, count)
        return np.asarray(train(answers, mixture)["heads"]["outcome"]["kernel"])

    return fitted


def reward_models(world, rng):
    """Weights [12 12] of models from bad to good."""
    found = []
    for _ in range(MODELS):
        count = int(np.exp(rng.uniform(np.log(FEWEST), np.log(MOST))))
        flipped, hidden = rng.uniform(0, FLIPPED), rng.uniform(0, HIDDEN)
        sides = two_answers(rng, world.features, MOST)
        label = ((sides[0] - sides[1]) @ world.gold > 0) ^ (rng.random(MOST) < flipped)
        seen = np.ones(WIDTH, np.float32)
        seen[rng.permutation(WIDTH)[: round(hidden * WIDTH)]] = 0
        found.append(fit()(np.concatenate(sides) * seen, label, count))
    return np.stack(found)


def measured(world, weights, rng):
    """What is said of one model: accuracy, AUC, and the gain of the best of 16."""
    sides = two_answers(rng, world.new, NEW_PAIRS)
    gap = (sides[0] - sides[1]) @ world.gold
    said = (sides[0] - sides[1]) @ weights * np.sign(gap)
    gold, scores = world.new @ world.gold, world.new @ weights
    right = gold > np.quantile(gold, 1 - BEST_SHARE)
    drawn = np.arange(NEW_PROMPTS)[:, None], rng.integers(0, ANSWERS, (NEW_PROMPTS, 32))
    return {
        "accuracy": pair_accuracy(said, np.zeros_like(said)),
        "auc": float(np.nanmean(prompt_aucs(list(scores), list(right)))),
        "best_of_16": best_of_k(scores[drawn], gold[drawn], (16,))[0] - gold.mean(),
    }


def policy_gains(worlds, weights):
    """[seeds 12]: gold that GRPO gains with each model's score."""
    run = trainer(LINEAR, grpo(kl_coef=0.0, clip_high=0.2), table_reward(), Plan())

    def one(world, weights, key):
        to_score, to_run = jax.random.split(key)
        state = table_state(world.table(weights), to_score)
        trained = run(world, start_at(), state, {"policy": RATE, "value": 0.0}, to_run)
        return world.gain(trained.params["policy"])

    every = jax.vmap(jax.vmap(one, (None, 0, None)), (0, 0, 0))
    return np.asarray(jax.jit(every)(worlds, jnp.asarray(weights), keys(SEEDS)))


@functools.cache
def found():
    """{metric or use: [seeds 12]}."""
    worlds, weights, said = linear_worlds(SEEDS), [], []
    for seed in range(SEEDS):
        world = jax.tree.map(lambda x, seed=seed: x[seed], worlds)
        rng = np.random.default_rng((seed, 1))
        weights.append(reward_models(world, rng))
        said.append([measured(world, own, rng) for own in weights[-1]])
    of_seeds = {k: np.array([[m[k] for m in row] for row in said]) for k in said[0][0]}
    return of_seeds | {"grpo": policy_gains(worlds, np.stack(weights))}


@pytest.mark.slow
def test_accuracy_and_auc_foretell_gains():
    for metric in METRICS:
        for use in USES:
            for x, y in zip(found()[metric], found()[use], strict=True):
                assert correlation(x, y) >= 0.9, (metric, use)
                low, high = bootstrap_interval(correlation, list(x[:, None]), list(y[:, None]))
                assert low > 0 and high <= 1, (metric, use, low, high)
