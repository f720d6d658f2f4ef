"""ODIN in the world of length_test.py: length kept out of quality by the loss, not by the data.

Chen et al. 2024, https://arxiv.org/abs/2402.07319. The 6,000 pairs are all used, as they are. Each
of 2 seeds, beside the reward model of balanced pairs:

    model      correlation with length   NRG ratio   mean length   quality     right on quality
    balanced        0.10, 0.10          0.99, 0.99   105 to 111   0.55, 0.55     0.685, 0.683
    ODIN           -0.01, 0.00          1.00, 1.00   105 to 105   0.55, 0.55     0.686, 0.685

Rules: the correlation of the quality head with length, among the samples of a prompt, is below 0.1
in size; NRG is above 0.9 of the gain; the gain in hidden quality is at least 0.95 of the balanced
one's, and accuracy on new pairs by quality at least the balanced one's less 0.02.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.odin import odin
from rlhf_jax.types import Texts
from tests.worlds import linear
from tests.worlds.length_test import (
    FEATURES,
    LONGEST,
    PAIRS,
    PER_LENGTH,
    PROMPTS,
    SAMPLES,
    balanced,
    fitted,
    outcome,
    responses,
)

STEPS, ROWS, RATE = 400, 128, 0.05
UNIT = 5  # tokens of the world that one token of a text stands for
HEADS = ("quality", "length")


def texts(tokens, lengths):
    """A prompt of one token and an answer of so many: all of them are the same row of features."""
    column = jnp.arange(LONGEST // UNIT + 1)[None]
    there = column <= lengths[:, None] // UNIT
    tokens = jnp.broadcast_to(tokens[:, None], there.shape)
    segment = there.astype(jnp.int32)
    return Texts(tokens=tokens, mask=there, loss_mask=there & (column > 0), segment=segment)


def mixture_of(batch):
    rows = batch["index"].shape[0]
    sides = {
        "chosen": texts(batch["index"], batch["long"]),
        "rejected": texts(batch["index"] + PAIRS, batch["short"]),
    }
    given = linear.pairs(np.zeros(rows), np.zeros(rows), np.ones(rows))
    return {"pairs": type(given)(**(vars(given) | sides))}


def quality_weights(rng, features, lengths):
    """The weights that the shipped trainer gives the quality head; both are [2 PAIRS ...]."""
    start = linear.zero_heads(FEATURES, HEADS)
    for name in HEADS:
        kernel = rng.normal(size=FEATURES) / np.sqrt(FEATURES + 1)
        start["heads"][name] = {"kernel": jnp.asarray(kernel, jnp.float32)}
    model = linear.linear_model(FEATURES, HEADS)
    train = linear.minibatches(
        model, start, {"pairs": 1.0}, mixture_of, learning_rate=RATE, joint=odin()
    )
    index = linear.epochs(rng, PAIRS, ROWS, STEPS)
    batches = dict(index=index, long=lengths[0][index], short=lengths[1][index])
    found = train(np.concatenate(features), {k: v.astype(np.int32) for k, v in batches.items()})
    return found["heads"]["quality"]["kernel"]


@functools.cache
def world(seed):
    """(mixing, lengths, features) of the better and worse answers of all pairs, and samples."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0]
    sides = [responses(rng, PAIRS, mixing) for _ in range(2)]
    gap = [a - b for a, b in zip(*sides, strict=True)]
    first = rng.random(PAIRS) < 1 / (1 + np.exp(-gap[1] - gap[0] / PER_LENGTH))
    lengths = [np.where(won, sides[0][0], sides[1][0]) for won in (first, ~first)]
    features = [np.where(won[:, None], sides[0][2], sides[1][2]) for won in (first, ~first)]
    return mixing, lengths, features, responses(rng, PROMPTS * SAMPLES, mixing)


@functools.cache
def found(kind, seed):
    """(Outcome, accuracy by quality on new pairs)."""
    mixing, lengths, features, samples = world(seed)
    rng = np.random.default_rng(100 + seed)
    if kind == "odin":
        own = quality_weights(rng, features, lengths)
    else:
        own = fitted((features[0] - features[1])[balanced(*lengths)])
    (_, better, one), (_, worse, other) = (responses(rng, 20_000, mixing) for _ in range(2))
    right = np.mean((one @ own > other @ own) == (better > worse))
    return outcome(*samples, own, rng), float(right)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_odin_keeps_length_out_of_quality(seed):
    model, right = found("odin", seed)
    assert abs(model.correlation) < 0.1
    assert model.ratio > 0.9
    assert model.quality > 0.5 and right > 0.66


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_odin_finds_as_much_quality_as_balanced_pairs(seed):
    (even, even_right), (model, right) = found("balanced", seed), found("odin", seed)
    assert model.quality >= 0.95 * even.quality
    assert right >= even_right - 0.02
