"""Reward models that learn length, and what balanced pairs mend, in a world of known quality.

After Singhal et al. 2023, "A Long Way to Go", https://arxiv.org/abs/2310.03716.
A response has a length, uniform from 10 to 200 tokens, and a hidden quality, normal, which is seen
with noise of standard deviation 1.5; both are mixed into 8 features. Of two responses the first is
preferred with log-odds Δquality + Δlength / 55. A policy answers a reward model by the tilt
exp(z) of its scores z, standardised: the best that it can do at its distance from the start.
"""

import functools
from typing import NamedTuple

import numpy as np
import pytest

from rlhf_jax.data.preferences import pairs
from rlhf_jax.ops.length_bias import length_gain, pair_lengths, within_prompt_correlations
from rlhf_jax.text.tokenizer import CharTokenizer
from tests.worlds import linear

PAIRS, FEATURES, SEEN = 6_000, 8, 1.5
SHORTEST, LONGEST, PER_LENGTH = 10, 200, 55
RIDGE = 1e-6
PROMPTS, SAMPLES = 4_000, 8
SEEDS = 2
TEXT = CharTokenizer("ab")


class Outcome(NamedTuple):
    """What a reward model is and what it does to the policy."""

    correlation: float  # of length and score among the samples of a prompt
    ratio: float  # NRG / ΔR
    before: float  # mean length
    after: float
    quality: float  # gain in hidden quality


def responses(rng, count, mixing):
    """(lengths, qualities, features) of so many responses."""
    lengths = rng.integers(SHORTEST, LONGEST + 1, count)
    quality = rng.normal(size=count)
    seen = quality + SEEN * rng.normal(size=count)
    middle, spread = (SHORTEST + LONGEST) / 2, PER_LENGTH
    rest = rng.normal(size=(count, FEATURES - 2))
    features = np.column_stack([seen, (lengths - middle) / spread, rest])
    return lengths, quality, (features @ mixing).astype(np.float32)


def records(chosen, rejected):
    """Pairs as a file has them, in texts of these numbers of tokens; end-of-text is one of them."""
    return [
        dict(prompt="b", chosen="a" * (long - 1), rejected="b" * (short - 1))
        for long, short in zip(chosen, rejected, strict=True)
    ]


def balanced(chosen, rejected):
    """Which pairs the shipped source keeps, as indices."""
    source = pairs(
        [records(chosen, rejected)], TEXT, template="{prompt}", max_length=LONGEST + 2,
        seed=0, shuffle=False, balance_lengths=True,
    )  # fmt: skip
    return source.batch(0, slice(None), len(source)).record


def fitted(gaps):
    """The weights that the shipped trainer gives pairs with these differences of features."""
    start = linear.zero_heads(FEATURES, ("outcome",))
    train = linear.trainer(
        linear.linear_model(FEATURES, ("outcome",)), start, {"pairs": 1.0}, RIDGE
    )
    rows = np.concatenate(
        [gaps, np.zeros((1, FEATURES), np.float32)]
    )  # the other half of each pair
    count = len(gaps)
    mixture = {"pairs": linear.pairs(np.arange(count), np.full(count, count), np.ones(count))}
    return np.asarray(train(rows, mixture)["heads"]["outcome"]["kernel"])


@functools.cache
def outcomes():
    """{kind of data: [Outcome of each seed]}, and the accuracy of "the longer wins"."""
    found, longer = {"standard": [], "balanced": []}, []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        mixing = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0]
        sides = [responses(rng, PAIRS, mixing) for _ in range(2)]
        gap = [a - b for a, b in zip(*sides, strict=True)]
        first = rng.random(PAIRS) < 1 / (1 + np.exp(-gap[1] - gap[0] / PER_LENGTH))
        chosen, rejected = (
            np.where(side, sides[0][0], sides[1][0]) for side in (first, ~first)
        )  # fmt: skip
        won = np.where(first[:, None], gap[2], -gap[2])
        none = np.zeros(PAIRS)
        longer.append(pair_lengths(none, none, chosen, rejected).longer_wins)
        samples = responses(rng, PROMPTS * SAMPLES, mixing)
        for name, kept in (
            ("standard", np.arange(PAIRS)),
            ("balanced", balanced(chosen, rejected)),
        ):
            found[name].append(outcome(*samples, fitted(won[kept]), rng))
    return found, float(np.mean(longer))


def outcome(lengths, quality, features, weights, rng) -> Outcome:
    scores = (features @ weights).astype(np.float64)
    scores = (scores - scores.mean()) / scores.std()
    share = np.exp(scores) / np.exp(scores).sum()
    tilted = rng.choice(len(scores), len(scores), p=share)  # as many samples after as before
    gain = length_gain(lengths, scores, lengths[tilted], scores[tilted])
    by_prompt = (list(x.reshape(PROMPTS, SAMPLES)) for x in (lengths, scores))
    return Outcome(
        correlation=float(np.nanmean(within_prompt_correlations(*by_prompt))),
        ratio=gain.ratio,
        before=float(lengths.mean()),
        after=float(share @ lengths),
        quality=float(share @ quality - quality.mean()),
    )


def test_a_reward_model_of_plain_pairs_is_mostly_length():
    assert 0.65 < outcomes()[1] < 0.71  # "the longer wins"
    for one in outcomes()[0]["standard"]:
        assert one.correlation > 0.7
        assert one.ratio < 0.4
        assert one.after > 1.25 * one.before


def test_balanced_pairs_leave_quality():
    for plain, balanced in zip(*outcomes()[0].values(), strict=True):
        assert balanced.correlation < 0.2
        assert balanced.ratio > 0.9
        assert balanced.quality > 1.5 * plain.quality


def test_equal_histograms_make_the_whole_gain_nrg():
    """NRG = ΔR exactly, whatever the rewards, if every bucket holds as many after as before."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST + 1, 500)
    old, new = rng.normal(size=500), rng.normal(size=500) + 0.01 * lengths
    within_bucket = lengths // 20 * 20 + rng.permutation(20)[lengths % 20]
    order = rng.permutation(500)
    found = length_gain(lengths, old, within_bucket[order], new[order])
    assert found.within == pytest.approx(found.gain, abs=1e-12)
    assert found.ratio == pytest.approx(1.0, abs=1e-12) and found.covered == 1.0


def test_a_reward_that_the_bucket_decides_has_no_nrg():
    rng = np.random.default_rng(0)
    before, after = rng.integers(10, 150, 500), rng.integers(40, 201, 500)
    reward = rng.normal(size=11)
    found = length_gain(before, reward[before // 20], after, reward[after // 20])
    assert found.within == pytest.approx(0.0, abs=1e-12) and abs(found.gain) > 0.1
