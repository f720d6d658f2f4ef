"""ODIN's correlation: numpy's value, the exact gradient from any parts, nothing where none is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.masking import masked_mean
from rlhf_jax.ops.odin import correlated, moments, odin, overlap


def numbers(seed=0, rows=40):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 90, rows).astype(np.float32)
    scores = (0.02 * lengths + rng.normal(size=rows)).astype(np.float32)
    return scores, lengths, rng.random(rows) < 0.8


def pearson(scores, lengths):
    """Written anew, for autodiff."""
    a, b = scores - scores.mean(), lengths - lengths.mean()
    return (a * b).sum() / jnp.sqrt((a**2).sum() * (b**2).sum())


def test_the_correlation_is_that_of_numpy():
    scores, lengths, present = numbers()
    found = moments(scores, lengths, present)
    wanted = np.corrcoef(scores[present], lengths[present])[0, 1]
    assert float(found.correlation) == pytest.approx(wanted, abs=1e-6) and wanted > 0.3
    assert float(found.score_std) == pytest.approx(scores[present].std(), rel=1e-5)
    assert float(found.length) == pytest.approx(lengths[present].mean(), rel=1e-6)


def test_the_gradient_is_exact_however_the_batch_is_cut():
    scores, lengths, present = numbers()
    wanted = np.zeros(len(scores))
    wanted[present] = jax.grad(pearson)(jnp.asarray(scores[present]), lengths[present])
    found = moments(scores, lengths, present)

    def part(scores, rows):
        each = correlated(found, scores[rows], jnp.asarray(lengths)[rows])
        return jnp.sum(jnp.where(present[rows], each, 0.0)) / present.sum()

    for parts in (1, 4):
        cuts = np.split(np.arange(40), parts)
        value = sum(float(part(jnp.asarray(scores), rows)) for rows in cuts)
        grads = sum(jax.grad(part)(jnp.asarray(scores), rows) for rows in cuts)
        np.testing.assert_allclose(grads, wanted, atol=1e-7)
        assert value == pytest.approx(float(found.correlation), abs=1e-6)


def test_padding_says_nothing():
    scores, lengths, present = numbers()
    dirty = np.where(present, scores, np.nan).astype(np.float32)
    clean = moments(np.where(present, scores, 0).astype(np.float32), lengths, present)
    jax.tree.map(np.testing.assert_array_equal, clean, moments(dirty, lengths, present))
    nothing = moments(dirty, lengths, np.zeros(len(present), bool))
    assert float(nothing.correlation) == 0 and not bool(nothing.varies)


@pytest.mark.parametrize("same", ["scores", "lengths"])
def test_where_nothing_varies_there_is_no_correlation_and_no_slope(same):
    scores, lengths, present = numbers()
    if same == "scores":
        scores = np.full_like(scores, 0.1)
    else:
        lengths = np.full_like(lengths, 7.3)
    found = moments(scores, lengths, present)
    mean, slope = jax.value_and_grad(
        lambda x: masked_mean(correlated(found, x, jnp.asarray(lengths)), jnp.asarray(present))
    )(jnp.asarray(scores))
    assert float(mean) == 0
    np.testing.assert_array_equal(slope, 0)


def test_the_overlap_of_weights():
    assert float(overlap(jnp.array([1.0, 2.0]), jnp.array([-3.0, 1.0]))) == 1.0
    with pytest.raises(ValueError, match=r"length_coef=-1\.0; wanted 0"):
        odin(length_coef=-1.0)
