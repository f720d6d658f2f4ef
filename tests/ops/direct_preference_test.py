"""Losses on pairs of answers against float64 loops, by hand, and what must not matter."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.direct_preference import (
    LOSSES,
    Answers,
    answer_nll,
    answers,
    direct_loss,
    direct_preference,
    implicit_reward,
)
from rlhf_jax.ops.preference import bradley_terry, dpo_margin

ROWS, LENGTH = 6, 7
LABEL = np.array([1.0, 0.0, 0.5, 0.9, 0.3, 1.0], np.float32)
MARGIN = np.array([0.0, 0.5, 1.0, 0.0, 2.0, 0.25], np.float32)
OPTIONS = dict(beta=0.4, label_smoothing=0.1, length_coef=0.05, nll_coef=0.2)


@dataclasses.dataclass
class Side:
    """Log-probs of policy and reference, and which tokens are the answer's."""

    policy: np.ndarray
    reference: np.ndarray
    counted: np.ndarray


def side(seed):
    """NaN where nothing may be read; the last row has an answer of one token."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 3, ROWS)
    last = rng.integers(4, LENGTH + 1, ROWS)
    first[-1], last[-1] = 2, 3
    column = np.arange(LENGTH)[None]
    counted = (column >= first[:, None]) & (column < last[:, None])
    policy, reference = -rng.exponential(2.0, (2, ROWS, LENGTH))
    return Side(
        policy=np.where(counted, policy, np.nan).astype(np.float32),
        reference=np.where(counted, reference, np.nan).astype(np.float32),
        counted=counted,
    )


CHOSEN, REJECTED = side(1), side(2)


def total(values, chosen, rejected, label=LABEL, margin=MARGIN):
    """Loss and likelihood term together, summed over pairs."""
    read = [
        answers(values, policy, given.reference, given.counted)
        for policy, given in ((chosen, CHOSEN), (rejected, REJECTED))
    ]
    loss = direct_loss(values, *read, label=label, margin=margin)
    return jnp.sum(loss + values.nll_coef * answer_nll(*read, label=label))


def looped(loss, chosen, rejected, i, *, beta, label_smoothing, length_coef, nll_coef):
    """The same of pair i in Python, and its derivative by each answer's tokens."""
    changes, likelihoods, sizes = [], [], []
    for given, policy in ((CHOSEN, chosen), (REJECTED, rejected)):
        tokens = [t for t in range(LENGTH) if given.counted[i, t]]
        change = sum(float(policy[i, t]) - float(given.reference[i, t]) for t in tokens)
        mean = loss in ("ipo", "sigmoid_norm")
        changes.append(change / len(tokens) if mean else change)
        likelihoods.append(sum(float(policy[i, t]) for t in tokens) / len(tokens))
        sizes.append(len(tokens))
    scale = 1.0 if loss == "ipo" else beta
    d = scale * (changes[0] - changes[1]) + length_coef * (sizes[0] - sizes[1])
    label, m = float(LABEL[i]), float(MARGIN[i])
    p = label * (1 - label_smoothing) + (1 - label) * label_smoothing

    def f(x):
        if loss == "hinge":
            return max(0.0, 1 - x), (-1.0 if x < 1 else 0.0)
        if loss == "ipo":
            return (x - 0.5 / beta) ** 2, 2 * (x - 0.5 / beta)
        return math.log1p(math.exp(-x)), -1 / (1 + math.exp(x))

    (one, slope), (other, back) = f(d - m), f(-d - m)
    value = p * one + (1 - p) * other
    value -= nll_coef * (label * likelihoods[0] + (1 - label) * likelihoods[1])
    by_d = scale * (p * slope - (1 - p) * back)
    slopes = []
    for sign, share, size in ((1, label, sizes[0]), (-1, 1 - label, sizes[1])):
        per_token = sign * by_d / (size if loss in ("ipo", "sigmoid_norm") else 1)
        slopes.append(per_token - nll_coef * share / size)
    return value, slopes


@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_against_a_loop(loss):
    values = direct_preference(loss=loss, **OPTIONS)
    found, gradients = jax.value_and_grad(total, argnums=(1, 2))(
        values, jnp.asarray(CHOSEN.policy), jnp.asarray(REJECTED.policy)
    )
    wanted = [looped(loss, CHOSEN.policy, REJECTED.policy, i, **OPTIONS) for i in range(ROWS)]
    assert float(found) == pytest.approx(sum(value for value, _ in wanted), rel=1e-5)
    for number, given in enumerate((CHOSEN, REJECTED)):
        slopes = np.array([slopes[number] for _, slopes in wanted])[:, None]
        # Nothing reaches the tokens that do not count, though there are NaNs.
        expected = np.where(given.counted, slopes, 0.0)
        np.testing.assert_allclose(gradients[number], expected, rtol=1e-4, atol=1e-6)


def pair(chosen, rejected, sizes=(1, 1)):
    """Two answers with given Δ, which are their log-probs too."""
    return [
        Answers(jnp.array([x]), jnp.array([x]), jnp.array([float(n)]))
        for x, n in zip((chosen, rejected), sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("options", "sizes", "label", "margin", "wanted"),
    [
        # Δ of 2 and -1, so d = 0.5 * 3 = 1.5
        (dict(loss="sigmoid"), (1, 1), 1.0, 0.0, math.log1p(math.exp(-1.5))),
        (dict(loss="sigmoid"), (1, 1), 0.0, 0.0, math.log1p(math.exp(1.5))),
        (dict(loss="sigmoid"), (1, 1), 1.0, 1.5, math.log(2)),
        (dict(loss="hinge"), (1, 1), 1.0, 0.0, 0.0),
        (dict(loss="hinge"), (1, 1), 0.0, 0.0, 2.5),
        # IPO wants 1/(2β) = 1, and Δ differ by 3
        (dict(loss="ipo"), (1, 1), 1.0, 0.0, 4.0),
        (dict(loss="ipo"), (1, 1), 1.0, 2.0, 0.0),
        (dict(loss="ipo"), (1, 1), 0.5, 0.0, 0.5 * 4 + 0.5 * 16),
        # a better answer that is 3 tokens shorter: d = 1.5 - 0.5 * 3 = 0, it must win by more
        (dict(loss="sigmoid", length_coef=0.5), (2, 5), 1.0, 0.0, math.log(2)),
        (dict(loss="hinge", length_coef=0.5), (5, 2), 0.0, 0.0, 4.0),
        # a quarter of labels is wrong
        (dict(loss="hinge", label_smoothing=0.25), (1, 1), 1.0, 0.0, 0.25 * 2.5),
    ],
)
def test_by_hand(options, sizes, label, margin, wanted):
    values = direct_preference(beta=0.5, **options)
    given = dict(label=jnp.array([label]), margin=jnp.array([margin]))
    found = direct_loss(values, *pair(2.0, -1.0, sizes), **given)
    assert float(found[0]) == pytest.approx(wanted, rel=1e-6, abs=1e-7)


def test_the_likelihood_term_by_hand():
    both = pair(-6.0, -1.0, (3, 2))
    found = [float(answer_nll(*both, label=jnp.array([p]))[0]) for p in (1.0, 0.0, 0.75)]
    assert found == [2.0, 0.5, 0.75 * 2 + 0.25 * 0.5]


@pytest.mark.parametrize("loss", LOSSES)
def test_swapping_answers_and_label_changes_nothing(loss):
    values = direct_preference(loss=loss, **OPTIONS)
    both = [answers(values, one.policy, one.reference, one.counted) for one in (CHOSEN, REJECTED)]
    there = direct_loss(values, *both, label=LABEL, margin=MARGIN)
    back = direct_loss(values, *both[::-1], label=1 - LABEL, margin=MARGIN)
    np.testing.assert_allclose(there, back, rtol=1e-5)
    there, back = answer_nll(*both, label=LABEL), answer_nll(*both[::-1], label=1 - LABEL)
    np.testing.assert_allclose(there, back, rtol=1e-6)


def test_reductions():
    """Plain DPO is Bradley-Terry of `dpo_margin`; a policy that has not moved knows nothing."""
    values = direct_preference(beta=0.4)
    both = [answers(values, one.policy, one.reference, one.counted) for one in (CHOSEN, REJECTED)]
    sums = [
        jnp.asarray(np.nansum(x, axis=1))
        for x in (CHOSEN.policy, REJECTED.policy, CHOSEN.reference, REJECTED.reference)
    ]
    margin = dpo_margin(*sums, beta=0.4)
    wanted = bradley_terry(margin, jnp.zeros_like(margin), label=LABEL, margin=MARGIN)
    found = direct_loss(values, *both, label=LABEL, margin=MARGIN)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    rewards = [implicit_reward(values, one) for one in both]
    np.testing.assert_allclose(rewards[0] - rewards[1], margin, rtol=1e-5, atol=1e-6)
    for loss, start in (("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 1 / (4 * 0.4**2))):
        values = direct_preference(loss=loss, beta=0.4)
        still = answers(values, CHOSEN.policy, CHOSEN.policy, CHOSEN.counted)
        found = direct_loss(values, still, still, label=LABEL, margin=np.zeros_like(MARGIN))
        np.testing.assert_allclose(found, start, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_answer_without_tokens_and_large_differences_stay_finite(loss):
    values = direct_preference(loss=loss, **OPTIONS)

    def far(logprobs):
        none = answers(values, logprobs, CHOSEN.reference, np.zeros_like(CHOSEN.counted))
        other = answers(values, 1e4 * logprobs, CHOSEN.reference, CHOSEN.counted)
        found = direct_loss(values, none, other, label=LABEL, margin=MARGIN)
        return jnp.sum(found + answer_nll(none, other, label=LABEL))

    value, gradient = jax.value_and_grad(far)(jnp.asarray(CHOSEN.policy))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(loss="sigmod"), "loss='sigmod'; known: sigmoid, sigmoid_norm, hinge, ipo"),
        (dict(beta=0.0), "beta=0.0; wanted more than 0"),
        (dict(beta=float("nan")), "beta=nan; wanted more than 0"),
        (dict(label_smoothing=0.5), "label_smoothing=0.5; wanted a share"),
        (dict(length_coef=-0.1), "length_coef=-0.1; wanted 0"),
        (dict(nll_coef=-1.0), "nll_coef=-1.0; wanted 0"),
    ],
)
def test_bad_values_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        direct_preference(**options)
