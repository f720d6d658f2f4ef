"""Best-of-n against a reward model of few preferences: the proxy rises, gold turns.

The world is that of ensemble_test.py (one member at a time, means over five members and 6 seeds):
gold is a bounded network, the proxy was fitted to 400 preferences, a quarter of them flipped, and
1 % of the candidates lie far outside and are bad. Scores are standardised on 4,000 usual answers.
Gao et al. 2022 (https://arxiv.org/abs/2210.10760) fit gold by d (alpha − beta d), where
d² = log n − (n − 1)/n; "Does RLHF Scale?" (https://arxiv.org/abs/2412.06000) reports that the
reward keeps climbing while gold stops. Measured, by the unbiased estimate from 4,096 samples:

{table}

Rules: the proxy grows with every n, gold is highest strictly inside, R² of the fit is above 0.85,
and the fitted peak and the best n lie within a factor of two of each other.
"""

import functools
import math

import numpy as np

from rlhf_jax.ops.fits import best_of_n_kl, overoptimisation
from rlhf_jax.ops.reward_metrics import best_of_k
from tests.worlds.ensemble_test import BAD, PROMPTS, World, responses

SEEDS, MOST = 6, 4096
COUNTS = tuple(2**i for i in range(13))


@functools.cache
def curve():
    """[2, n]: proxy and gold of the best of n."""
    found = []
    for seed in range(SEEDS):
        world = World(seed)
        usual = world.scores(world.rng.standard_normal((4000, 8), np.float32))
        candidates, outside = responses(world.rng, PROMPTS * MOST)
        gold = np.where(outside, BAD, world.gold(candidates)).reshape(PROMPTS, MOST)
        for member, own in zip(world.scores(candidates), usual, strict=True):
            scores = ((member - own.mean()) / own.std()).reshape(PROMPTS, MOST)
            found.append([best_of_k(scores, x, COUNTS) for x in (scores, gold)])
    return np.mean(found, axis=0)


def fitted():
    _, gold = curve()
    return overoptimisation(np.sqrt(best_of_n_kl(np.array(COUNTS))), gold - gold[0], form="best_of_n")


def test_the_proxy_rises_and_gold_turns():
    proxy, gold = curve()
    assert (np.diff(proxy) > 0).all(), proxy
    assert 0 < gold.argmax() < len(COUNTS) - 1, gold


def test_the_form_of_best_of_n_fits():
    assert fitted().r_squared > 0.85, fitted()


def test_the_fitted_peak_is_where_gold_is_highest():
    best = COUNTS[curve()[1].argmax()]
    every = np.arange(1, MOST + 1)
    peak = every[np.abs(np.sqrt(best_of_n_kl(every)) - fitted().peak).argmin()]
    assert abs(math.log2(peak / best)) <= 1, (int(peak), best)
