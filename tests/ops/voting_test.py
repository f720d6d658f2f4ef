"""Votes of several samples, against counting by hand and all subsets."""

import itertools

import numpy as np
import pytest

from rlhf_jax.ops.voting import majority_of_k

ANSWERS = ["7", "8", "7", None, "9"]
GOLD = np.array([1.0, 0.0, 1.0, 0.0, 0.0])


def brute(answers, gold, size, weights):
    """The mean over all subsets, by counting."""
    worth = {a: np.mean([g for b, g in zip(answers, gold, strict=True) if b == a]) for a in answers}
    total = []
    for subset in itertools.combinations(range(len(answers)), size):
        tally = {}
        for i in subset:
            if answers[i] is not None and weights[i]:
                tally[answers[i]] = tally.get(answers[i], 0.0) + weights[i]
        top = [a for a, votes in tally.items() if votes == max(tally.values())]
        total.append(np.mean([worth[a] for a in top]) if top else 0.0)
    return np.mean(total)


def test_all_samples_and_one():
    # 7 has two votes of four; one sample is right in two of five cases.
    np.testing.assert_array_equal(majority_of_k(ANSWERS, GOLD, (1, 5)), [0.4, 1.0])
    # Weights turn the vote: 8 and 9 together cannot, 8 alone can.
    weights = np.array([0.2, 0.5, 0.2, 9.0, 0.1])
    np.testing.assert_array_equal(majority_of_k(ANSWERS, GOLD, (5,), weights=weights), [0.0])
    # A tie of 7 and 8 is half right.
    np.testing.assert_array_equal(majority_of_k(ANSWERS[:2], GOLD[:2], (2,)), [0.5])
    assert majority_of_k([None, None], np.ones(2), (1, 2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("weights", [None, np.array([0.5, 1.0, 0.25, 1.0, 2.0])])
def test_between_them_it_is_the_mean_over_subsets(weights):
    votes = np.ones(5) if weights is None else weights
    found = majority_of_k(ANSWERS, GOLD, (2, 3, 4), weights=weights, draws=40_000)
    wanted = [brute(ANSWERS, GOLD, k, votes) for k in (2, 3, 4)]
    # 5 standard errors of a mean of 40,000 numbers in [0, 1].
    np.testing.assert_allclose(found, wanted, atol=5 * 0.5 / 200)


def test_the_same_seed_gives_the_same_subsets():
    one, again, other = (
        majority_of_k(ANSWERS, GOLD, (2, 3), draws=5, seed=seed) for seed in (0, 0, 1)
    )
    assert one.tolist() == again.tolist() != other.tolist()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="size 6 of majority_of_k; wanted 1 to 5"):
        majority_of_k(ANSWERS, GOLD, (6,))
    with pytest.raises(ValueError, match=r"weight -1.0; wanted 0 or more"):
        majority_of_k(ANSWERS, GOLD, (2,), weights=-np.ones(5))
