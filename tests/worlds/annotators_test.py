"""What becomes of disagreement among annotators: votes as labels, and groups with a head each.

Worlds for the claims of Lambert, Gilbert and Zick 2023, "The History and Risks of Reinforcement
Learning and Human Feedback", https://arxiv.org/abs/2310.13595: one scalar that stands for people
who disagree. Pairs have log-odds that are linear in 8 features of known weights.
"""

import functools

import numpy as np
from scipy import special

from rlhf_jax.data.preferences import VOTES, label_from_votes
from rlhf_jax.ops.calibration import expected_calibration_error, log_loss, pair_claims
from rlhf_jax.ops.reward_metrics import pair_accuracy
from tests.worlds.linear import linear_model, pairs, scorer, trainer, zero_heads

COUNT, FEATURES = 20_000, 8
RIDGE = 1e-6
SAMPLE = 20_000  # pairs that nobody trained on
CONTESTED = 0.3  # share of items on which two groups want the opposite
SURE = 4.0  # standard deviation of a group's log-odds
# What is left of two opposite groups in a pooled model is noise, and a direction of noise in few
# dimensions agrees with one of the groups by chance.
WIDE = 64


# Votes


@functools.cache
def errors():
    """{(annotators, how): the largest error of a weight}."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=FEATURES)
    rows = rng.normal(size=(COUNT, FEATURES)).astype(np.float32)
    features = np.concatenate([rows, np.zeros((1, FEATURES), np.float32)])
    chance = special.expit(rows @ weights)
    heads = ("outcome",)
    model, start = linear_model(FEATURES, heads), zero_heads(FEATURES, heads)
    train = trainer(model, start, {"pairs": 1.0}, RIDGE)
    found = {}
    for annotators in (1, 3, 5):
        votes = (rng.random((COUNT, annotators)) < chance[:, None]).astype(np.float32)
        for how in VOTES:
            label = [label_from_votes(row, how=how) for row in votes.tolist()]
            # The second half of every pair is the row of zeros.
            mixture = {"pairs": pairs(np.arange(COUNT), np.full(COUNT, COUNT), label)}
            params = train(features, mixture)
            fitted = np.asarray(params["heads"]["outcome"]["kernel"])
            found[annotators, how] = float(np.abs(fitted - weights).max())
    return found


def test_soft_labels_recover_the_weights():
    for annotators in (1, 3, 5):
        assert errors()[annotators, "mean"] < 0.1, errors()


def test_majority_labels_inflate_them():
    found = errors()
    assert found[1, "majority"] == found[1, "mean"]  # one vote is its own majority
    assert found[3, "majority"] > 0.5, found
    assert found[5, "majority"] > found[3, "majority"], found


# Groups


def group_pairs(rng, weights, group):
    """(features [M 128], winner is the first [M], contested [M]) as one group judges them.

    A pair is about a contested item or not; its features stand in the half that is of its kind.
    """
    rows = rng.normal(size=(COUNT + SAMPLE, WIDE))
    contested = rng.random(COUNT + SAMPLE) < CONTESTED
    wish = np.where(contested, group * (rows @ weights[1]), rows @ weights[0])
    first = rng.random(COUNT + SAMPLE) < special.expit(wish)
    halves = np.concatenate([rows * ~contested[:, None], rows * contested[:, None]], axis=1)
    return halves.astype(np.float32), first, contested


@functools.cache
def judged():
    """{model: {group: (scores of winners [M], of losers [M], contested [M])}}, on held-out pairs.

    "pooled" is one head for the pairs of both groups, "own" a head for each on the same trunk.
    """
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(2, WIDE))
    weights *= SURE / np.linalg.norm(weights, axis=1, keepdims=True)
    groups = {name: group_pairs(rng, weights, sign) for name, sign in (("a", 1), ("b", -1))}
    # Rows of the table: the pairs of a, those of b, and one of zeros, the second half of all pairs.
    zeros = np.zeros((1, 2 * WIDE), np.float32)
    features = np.concatenate([groups["a"][0], groups["b"][0], zeros])
    start = {"a": 0, "b": COUNT + SAMPLE}
    mixture = {
        name: pairs(start[name] + np.arange(COUNT), np.full(COUNT, len(features) - 1), y[:COUNT])
        for name, (_, y, _) in groups.items()
    }
    sources = dict.fromkeys(groups, 0.5)
    settings = {
        "pooled": (("outcome",), {}),
        "own": (("of_a", "of_b"), dict(heads={"a": "of_a", "b": "of_b"})),
    }
    found = {}
    for name, (heads, options) in settings.items():
        model = linear_model(2 * WIDE, heads)
        train = trainer(model, zero_heads(2 * WIDE, heads), sources, RIDGE, **options)
        params = train(features, mixture)
        score = scorer(model)(params, features, np.arange(len(features)))
        found[name] = {}
        for group, (_, first, contested) in groups.items():
            rows = start[group] + np.arange(COUNT, COUNT + SAMPLE)
            said = score[options["heads"][group] if options else "outcome"]
            gap = said[rows, 0] - said[-1, 0]
            won = np.where(first[COUNT:], gap, -gap)
            found[name][group] = (won, np.zeros(SAMPLE), contested[COUNT:])
    return found


def accuracy(name, group):
    """On the contested items."""
    better, worse, contested = judged()[name][group]
    return pair_accuracy(better[contested], worse[contested])


def claims(name, groups):
    """Logits and labels of "the higher score is better" for the pairs of some groups."""
    sides = [judged()[name][group][:2] for group in groups]
    return pair_claims(*(np.concatenate(side) for side in zip(*sides, strict=True)))


def ece(name, groups):
    logits, labels = claims(name, groups)
    return expected_calibration_error(special.expit(logits), labels, least=0.5)


def test_a_pooled_model_is_at_chance_where_groups_disagree():
    for group in "ab":
        assert 0.4 < accuracy("pooled", group) < 0.6
        assert accuracy("own", group) > 0.8


def test_calibration_over_all_hides_it():
    # One number over both groups calls the pooled model calibrated; groups and log loss do not.
    assert ece("pooled", "ab") < 0.02
    for group in "ab":
        assert ece("own", group) < 0.02
    assert log_loss(*claims("own", "ab")) < log_loss(*claims("pooled", "ab")) - 0.1
