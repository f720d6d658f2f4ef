"""PRIME against a loop, and what its baseline is for."""

import dataclasses
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.prime import prime
from tests.algorithms import loops
from tests.algorithms.loops import GROUP, Loss, Wanted, batch, ours


def prime_loop(experience, loss, *, coef=5.0, gamma=1.0, size=GROUP):
    """A = o_i − mean of the others' + c Σ γ^(u−t) (p_u − mean of the others' mean p)."""
    rows = loops.rows_of(experience)
    means = [sum(row.process) / max(len(row.process), 1) for row in rows]
    advantages, returns = [], []
    for i, row in enumerate(rows):
        first = i - i % size
        others = [j for j in range(first, first + size) if j != i]
        outcome = row.outcome - statistics.fmean(rows[j].outcome for j in others)
        baseline = statistics.fmean(means[j] for j in others)
        gained = loops.to_go([p - baseline for p in row.process], gamma)
        advantages.append([outcome + coef * x for x in gained])
        returns.append([row.outcome + coef * x for x in loops.to_go(row.process, gamma)])

    def terms(point, still):
        return loops.policy_terms(rows, advantages, loss, point, still)

    return Wanted(advantages, returns, terms)


@pytest.mark.parametrize(
    ("options", "loss", "loop"),
    [
        ({}, Loss(), {}),
        (
            {
                "coef": 0.7, "gamma": 0.9, "clip_low": 0.1, "clip_high": 0.4, "kl_coef": 0.3,
                "aggregate": "sequence_mean_token_mean",
            },
            Loss(low=0.1, high=0.4, kl=0.3, how="sequence_mean_token_mean"),
            {"coef": 0.7, "gamma": 0.9},
        ),
    ],
    ids=["defaults", "discounted"],
)  # fmt: skip
def test_prime_against_a_loop(options, loss, loop):
    data = batch()
    found = loops.assert_agrees("prime", data, prime_loop(data[0], loss, **loop), **options)
    fraction = found.metrics["policy/clip_fraction"]
    assert 0 < float(fraction.total) < float(fraction.count)


def with_process(experience, process):
    mask = experience.rollouts.mask
    process = jnp.where(mask, jnp.asarray(process, jnp.float32), jnp.nan)
    scores = dataclasses.replace(experience.scores, process=process)
    return dataclasses.replace(experience, scores=scores)


def test_the_same_score_at_every_token_is_worth_nothing():
    """Whatever the lengths: else more tokens would be paid more, or less."""
    experience, output = batch(lengths=(6, 3, 1, 2, 5, 4, 6, 1))
    none = ours("prime", (with_process(experience, 0.0), output)).targets
    same = ours("prime", (with_process(experience, 0.4), output)).targets
    np.testing.assert_allclose(same.advantages, none.advantages, rtol=0, atol=1e-5)
    assert not np.allclose(same.returns, none.returns, atol=0.1)


def test_without_process_scores_it_is_rloo():
    experience, output = batch()
    given = (with_process(experience, 0.0), output)
    mine = ours("prime", given)
    theirs = ours("rloo", given, kl_coef=0.0, form="clip", aggregate="token_mean")
    np.testing.assert_allclose(mine.targets.advantages, theirs.targets.advantages, atol=1e-6)
    np.testing.assert_allclose(mine.gradient.logprobs, theirs.gradient.logprobs, atol=1e-6)


def test_a_token_is_paid_for_what_comes_after_it():
    """A score at one token moves the advantages of the tokens up to it, by the same amount."""
    experience, output = batch(lengths=(6,) * 8)
    process = np.zeros((8, 6))
    plain = ours("prime", (with_process(experience, process), output)).targets.advantages
    process[0, 3] = -1.0
    moved = ours("prime", (with_process(experience, process), output)).targets.advantages
    difference = np.asarray(moved - plain)
    np.testing.assert_allclose(difference[0], [-5.0] * 4 + [0.0] * 2, atol=1e-5)
    # The three others of its group gain what their baseline fell, at each of the tokens to come.
    fell = 5.0 / 6 / 3
    for row in (1, 2, 3):
        np.testing.assert_allclose(difference[row], fell * np.arange(6, 0, -1), rtol=1e-4)
    np.testing.assert_array_equal(difference[4:], 0.0)


def test_prime_refuses():
    for coef in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"coef={coef}; wanted more than 0"):
            prime(coef=coef)
    with pytest.raises(ValueError, match=r"gamma=1.1; wanted a number from 0 to 1"):
        prime(gamma=1.1)
    with pytest.raises(ValueError, match=r"clip_low=2; wanted 0 to 1"):
        prime(clip_low=2)
    with pytest.raises(ValueError, match="needs groups of 2 or more"):
        prime().targets(batch(group=1)[0], 1, ())
    assert not prime().needs.reference and prime(kl_coef=0.1).needs.reference
