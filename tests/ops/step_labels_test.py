"""Labels from outcomes and aggregates of steps: literal numbers, a slow loop, masking."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.step_labels import AGGREGATES, aggregate, hard_labels, soft_labels

RIGHT = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]], bool)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(logits, how):
    """The definition, in Python numbers, over the logits of one row's steps."""
    probabilities = [sigmoid(x) for x in logits]
    return {
        "min": min(probabilities),
        "product": math.prod(probabilities),
        "mean": sum(probabilities) / len(probabilities),
        "last": probabilities[-1],
        "sum": sum(logits),
    }[how]


def test_labels_literal():
    np.testing.assert_array_equal(hard_labels(RIGHT), [0.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(soft_labels(RIGHT), [0.0, 0.25, 0.75, 1.0])
    assert hard_labels(RIGHT).dtype == soft_labels(RIGHT).dtype == jnp.float32


def test_one_continuation_makes_both_labels_one_and_more_never_lower_the_hard_one():
    np.testing.assert_array_equal(hard_labels(RIGHT[:, :1]), soft_labels(RIGHT[:, :1]))
    grown = [np.asarray(hard_labels(RIGHT[:, :n])) for n in (1, 2, 3, 4)]
    assert all((more >= less).all() for less, more in itertools.pairwise(grown))
    assert (np.asarray(hard_labels(RIGHT)) >= np.asarray(soft_labels(RIGHT))).all()


def test_labels_from_no_outcome_are_an_error():
    for label in (hard_labels, soft_labels):
        with pytest.raises(ValueError, match="wanted 1 or more"):
            label(np.zeros((3, 0), bool))


def test_aggregates_literal():
    even = math.log(3)  # odds 3 to 1: probability 3/4
    logits = np.array([[0.0, 0.0, even, 0.0, -even]], np.float32)
    ends = np.array([[True, False, True, False, True]])
    found = {how: float(aggregate(logits, ends, how=how)[0]) for how in AGGREGATES}
    wanted = dict(min=0.25, product=0.5 * 0.75 * 0.25, mean=0.5, last=0.25, sum=0.0)
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("how", AGGREGATES)
def test_aggregates_are_the_definition_on_random_rows_whatever_stands_in_padding(how):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(32, 9)).astype(np.float32)
    ends = rng.random((32, 9)) < 0.4
    ends[np.arange(32), rng.integers(9, size=32)] = True
    wanted = [by_hand(row[end].tolist(), how) for row, end in zip(logits, ends, strict=True)]
    for padding in (0.0, np.nan, np.inf, -np.inf):
        filled = np.where(ends, logits, padding).astype(np.float32)
        found = aggregate(filled, ends, how=how)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        slopes = jax.grad(lambda x, end: jnp.sum(aggregate(x, end, how=how)))(filled, ends)
        assert np.isfinite(slopes).all() and not np.asarray(slopes)[~ends].any()


@pytest.mark.parametrize("how", AGGREGATES)
def test_one_step_is_its_own_aggregate_and_a_row_without_steps_has_none(how):
    logits = np.array([[1.5, -2.0], [1.5, -2.0]], np.float32)
    ends = np.array([[False, True], [False, False]])
    found = np.asarray(aggregate(logits, ends, how=how))
    assert found[0] == pytest.approx(-2.0 if how == "sum" else sigmoid(-2.0), rel=1e-6)
    assert np.isnan(found[1])


def test_a_product_of_many_steps_is_not_rounded_away():
    logits = np.full((1, 1000), 10.0, np.float32)  # each step is wrong once in 22,027 times
    found = float(aggregate(logits, np.ones((1, 1000), bool), how="product")[0])
    assert found == pytest.approx(sigmoid(10.0) ** 1000, rel=1e-4)


def test_an_unknown_aggregate_is_an_error():
    with pytest.raises(ValueError, match=r"'median'.*min, product, mean, last, sum"):
        aggregate(np.zeros((1, 2), np.float32), np.ones((1, 2), bool), how="median")
