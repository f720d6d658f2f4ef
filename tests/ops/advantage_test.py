"""The advantage model's losses: literal numbers, symmetry, where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.advantage import advantage, bounding, expected_error


def log_sigmoid(x):
    return -np.log1p(np.exp(-np.float64(x)))


def test_the_bound_by_hand():
    chosen, rejected = np.float32([0.0, 3.0, -1.0]), np.float32([0.0, -3.5, 4.0])
    found = bounding(jnp.asarray(chosen), jnp.asarray(rejected), margin=2.5)
    wanted = -log_sigmoid(2.5 - chosen) - log_sigmoid(2.5 + rejected)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert float(found[0]) == pytest.approx(2 * 0.0788897, rel=1e-5)  # −2 log σ(2.5)


def test_swapping_the_sides_and_the_label_changes_nothing():
    rng = np.random.default_rng(0)
    one, other, label = (jnp.asarray(rng.normal(size=6), jnp.float32) for _ in range(3))
    label = jax.nn.sigmoid(label)
    np.testing.assert_allclose(
        bounding(one, other, label=label), bounding(other, one, label=1 - label), rtol=1e-6
    )


def test_a_level_of_both_answers_falls_and_even_ones_stay():
    """The gradient in a common shift c is σ(r_c + c − m) − σ(−m − r_r − c)."""

    def shifted(shift, size=1.0):
        return bounding(jnp.array([size + shift]), jnp.array([-size + shift]))[0]

    assert float(jax.grad(shifted)(0.0)) == pytest.approx(0.0, abs=1e-7)
    wanted = 1 / (1 + np.exp(-(1 + 3 - 2.5))) - 1 / (1 + np.exp(2.5 - 1 + 3))
    assert float(jax.grad(shifted)(3.0)) == pytest.approx(wanted, rel=1e-5)
    assert float(jax.grad(shifted)(1e4)) == pytest.approx(1.0)  # far away it neither grows nor ends


def test_what_is_expected_follows_scores_and_does_not_move_them():
    expected, scores = jnp.array([1.0, 0.0]), jnp.array([3.0, -1.0])
    np.testing.assert_allclose(expected_error(expected, scores), [2.0, 0.5])
    to_expected, to_scores = jax.grad(lambda e, r: jnp.sum(expected_error(e, r)), argnums=(0, 1))(
        expected, scores
    )
    np.testing.assert_allclose(to_expected, expected - scores)
    np.testing.assert_array_equal(to_scores, 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(margin=0.0), r"margin=0\.0; wanted more than 0"),
        (dict(margin=float("nan")), "margin=nan"),
        (dict(bound_coef=-1.0), r"bound_coef=-1\.0; wanted 0"),
        (dict(expected_coef=0.0), r"expected_coef=0\.0; wanted more than 0"),
        (dict(bound="scores"), "bound='scores'; known: score, advantage"),
    ],
)
def test_values_that_cannot_be_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        advantage(**values)
