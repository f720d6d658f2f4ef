"""The clipped objectives: literal corners, a loop, gradients where a clip acts."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import surrogate


def policy_loss(new, old, advantages, **values):
    """Without padding."""
    mask = np.ones(new.shape, bool)
    return surrogate.policy_loss(new, old, advantages, mask, surrogate.Surrogate(**values))


def at(ratio, advantage, **kwargs):
    options = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None} | kwargs
    shaped = jnp.array([[math.log(ratio)]]), jnp.zeros((1, 1)), jnp.array([[advantage]])
    loss, clipped, found = policy_loss(*shaped, **options)
    return float(loss[0, 0]), bool(clipped[0, 0]), float(found[0, 0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped"),
    [
        (1.0, 2.0, 2.0, False),
        (1.1, 2.0, 2.2, False),
        (2.0, 2.0, 2.56, True),  # too far up: held at 1.28
        (0.5, 2.0, 1.0, False),  # wrong way: free to come back
        (0.5, -2.0, -1.6, True),  # too far down: held at 0.8
        (2.0, -2.0, -4.0, False),
        (10.0, -1.0, -10.0, False),
        (5.0, 0.0, 0.0, False),
    ],
)
def test_clip_by_hand(ratio, advantage, objective, clipped):
    loss, found, _ = at(ratio, advantage)
    assert loss == pytest.approx(-objective, rel=1e-6)
    assert found is clipped


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    loss, clipped, ratio = at(10.0, -1.0, dual_clip=3.0)
    assert (loss, clipped) == (3.0, True)
    assert ratio == pytest.approx(10.0)
    assert at(2.0, -1.0, dual_clip=3.0)[:2] == at(2.0, -1.0)[:2]
    assert at(10.0, 1.0, dual_clip=3.0)[:2] == at(10.0, 1.0)[:2]


def loop_surrogate(new, old, advantage, low, high, dual):
    ratio = math.exp(new - old)
    best = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return -max(best, dual * advantage) if dual and advantage < 0 else -best


@pytest.mark.parametrize("dual", [None, 3.0])
def test_clip_against_a_loop(dual):
    rng = np.random.default_rng(0)
    new, old, advantages = rng.normal(size=(3, 4, 5)).astype(np.float32)
    loss, _, ratio = policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.3, dual_clip=dual)
    for i in np.ndindex(4, 5):
        wanted = loop_surrogate(float(new[i]), float(old[i]), float(advantages[i]), 0.2, 0.3, dual)
        assert float(loss[i]) == pytest.approx(wanted, rel=1e-5)
        assert float(ratio[i]) == pytest.approx(math.exp(new[i] - old[i]), rel=1e-5)


def test_gradient_is_the_policy_gradient_at_ratio_one_and_zero_where_clipped():
    old = jnp.zeros((1, 4))
    new = jnp.log(jnp.array([[1.0, 1.0, 2.0, 10.0]]))
    advantages = jnp.array([[1.5, -2.0, 1.0, -1.0]])

    def total(new):
        loss, clipped, ratio = policy_loss(
            new, old, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0
        )
        return jnp.sum(loss), (clipped, ratio)

    gradient, (clipped, ratio) = jax.grad(total, has_aux=True)(new)
    np.testing.assert_array_equal(ratio[0, :2], 1.0)  # exactly
    np.testing.assert_allclose(gradient, [[-1.5, 2.0, 0.0, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(clipped[0], [False, False, True, True])


def test_extreme_differences_are_finite():
    new, old = jnp.array([[0.0, -1e4]]), jnp.array([[-1e4, 0.0]])

    def total(new):
        return jnp.sum(policy_loss(new, old, -jnp.ones((1, 2)), clip_low=0.2, clip_high=0.2)[0])

    value, gradient = jax.value_and_grad(total)(new)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("value", "wanted"),
    # Old value 1, return 3, clip 0.5: values are held to [0.5, 1.5].
    [(1.0, 2.0), (1.25, 0.5 * 1.75**2), (3.0, 0.5 * 1.5**2), (0.0, 0.5 * 9.0)],
)
def test_value_error_by_hand(value, wanted):
    one = jnp.ones((1, 1))
    found = surrogate.value_error(value * one, one, 3 * one, clip=0.5)
    assert float(found[0, 0]) == pytest.approx(wanted)
    free = surrogate.value_error(value * one, one, 3 * one, clip=None)
    assert float(free[0, 0]) == pytest.approx(0.5 * (value - 3) ** 2)


def test_value_gradient_stops_only_past_the_clip():
    values = jnp.array([[1.0, 1.25, 1.6, 0.0]])
    one = jnp.ones((1, 4))
    gradient = jax.grad(lambda v: jnp.sum(surrogate.value_error(v, one, 3 * one, clip=0.5)))(values)
    np.testing.assert_allclose(gradient, [[-2.0, -1.75, 0.0, -3.0]])


X = np.array([[1.0, 2.0, 3.0], [10.0, np.nan, np.nan], [np.nan] * 3], np.float32)


@pytest.mark.parametrize(
    ("how", "constant", "total", "count"),
    [
        ("token_mean", None, 16.0, 4),
        ("sequence_mean_token_mean", None, 2.0 + 10.0, 2),
        ("sequence_mean_token_sum", None, 6.0 + 10.0, 2),
        ("sequence_mean_token_sum_norm", 8.0, 16.0 / 8, 2),
    ],
)
def test_aggregations_by_hand(how, constant, total, count):
    mean = surrogate.aggregate(X, ~np.isnan(X), how, constant=constant)
    assert (float(mean.total), float(mean.count)) == (total, count)
    gradient = jax.grad(
        lambda x: surrogate.aggregate(x, ~np.isnan(X), how, constant=constant).total
    )(jnp.asarray(X))
    np.testing.assert_array_equal(np.asarray(gradient)[np.isnan(X)], 0)


def test_all_aggregations_agree_on_full_rows_of_one_length():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    found = []
    for how, constant, scale in [
        ("token_mean", None, 1),
        ("sequence_mean_token_mean", None, 1),
        ("sequence_mean_token_sum", None, 4),
        ("sequence_mean_token_sum_norm", 4.0, 1),
    ]:
        mean = surrogate.aggregate(x, np.ones_like(x, bool), how, constant=constant)
        found.append(float(mean.total) / float(mean.count) / scale)
    np.testing.assert_allclose(found, x.mean(), rtol=1e-5)


def test_wrong_choices_are_refused():
    mask = ~np.isnan(X)
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; known: token_mean"):
        surrogate.aggregate(X, mask, "mean")
    with pytest.raises(ValueError, match="needs a constant above 0, got None"):
        surrogate.aggregate(X, mask, "sequence_mean_token_sum_norm")
    with pytest.raises(ValueError, match="uses no constant, got 3"):
        surrogate.aggregate(X, mask, "token_mean", constant=3.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip_low": 1.5}, "clip_low=1.5; wanted 0 to 1: a ratio is never below 0, so 1 already"),
        ({"clip_low": -0.1}, "clip_low=-0.1; wanted 0 to 1"),
        ({"clip_low": math.nan}, "clip_low=nan; wanted 0 to 1"),
        ({"clip_high": -0.2}, "clip_high=-0.2; wanted 0 or more"),
        ({"kl_coef": -0.05}, "kl_coef=-0.05; wanted 0 or more"),
        ({"kl_coef": math.nan}, "kl_coef=nan; wanted 0 or more"),
        ({"entropy_coef": -1}, "entropy_coef=-1; wanted 0 or more"),
        ({"ratio": "turn"}, "unknown ratio 'turn'; known: token, sequence"),
        ({"form": "ppo"}, "unknown form 'ppo'; known: clip, cispo, reinforce"),
        ({"kl_place": "advantage"}, "unknown kl_place 'advantage'; known: loss, reward"),
        ({"kl_estimator": "k4"}, "unknown KL estimator 'k4'; known: k1, k2, k3, k3+"),
        ({"aggregate": "mean"}, "unknown aggregation 'mean'; known: token_mean"),
        ({"constant": 3}, "aggregation 'token_mean' uses no constant, got 3"),
        (
            {"aggregate": "sequence_mean_token_sum_norm", "constant": -1},
            "needs a constant above 0, got -1",
        ),
        ({"dual_clip": 1.2}, "dual_clip=1.2; wanted more than 1 + the clip above = 1.2"),
        ({"dual_clip": 3, "clip_high": 5}, "dual_clip=3; wanted more than 1 + the clip above = 6"),
        ({"dual_clip": math.nan}, "dual_clip=nan; wanted more than 1 + the clip above = 1.2"),
        (
            {"kl_place": "reward", "kl_weighted": True},
            "kl_weighted=True, but rewards have no ratio; set kl_place='loss'",
        ),
        (
            {"kl_estimator": "k3+", "kl_weighted": True},
            "kl_weighted=True with kl_estimator='k3+': times the ratio only k1 and k3 have the",
        ),
        ({"kl_estimator": "k2", "kl_weighted": True}, "kl_weighted=True with kl_estimator='k2'"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        surrogate.check_surrogate(surrogate.Surrogate(**values))


def test_possible_values_are_taken():
    edges = {"clip_low": 1, "clip_high": 0, "dual_clip": 1.01, "kl_coef": 0, "entropy_coef": 0}
    for values in ({}, edges, {"kl_weighted": True, "kl_coef": 0.1}):
        surrogate.check_surrogate(surrogate.Surrogate(**values))


@pytest.mark.parametrize(("place", "in_reward", "in_loss"), [("reward", 0.3, 0), ("loss", 0, 0.3)])
def test_the_kl_has_one_place(place, in_reward, in_loss):
    values = surrogate.Surrogate(kl_coef=0.3, kl_place=place)
    assert (values.reward_kl, values.loss_kl) == (in_reward, in_loss)


def test_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    new = np.log(np.array([[1.0, 4.0, 16.0], [3.0, np.nan, np.nan], [np.nan] * 3], np.float32))
    mask = ~np.isnan(new)
    (filled,) = surrogate.filled(mask, new)
    ratio = surrogate.policy_ratio(filled, jnp.zeros((3, 3)), mask, "sequence")
    np.testing.assert_allclose(ratio[:, 0], [4.0, 3.0, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(ratio, np.broadcast_to(ratio[:, :1], ratio.shape))
    by_token = surrogate.policy_ratio(filled, jnp.zeros((3, 3)), mask, "token")
    np.testing.assert_allclose(by_token[0], [1.0, 4.0, 16.0], rtol=1e-6)


def test_cispo_and_reinforce_by_hand():
    """Ratio 9, log π = log 9: the weight is held at 1 + ε = 6 and has no gradient; REINFORCE has
    none to hold."""
    new, one = jnp.full((1, 1), math.log(9.0)), jnp.ones((1, 1))
    for form, weight, acted in [("cispo", 6.0, True), ("reinforce", 1.0, False)]:

        def loss(new, form=form):
            found = policy_loss(new, 0 * one, 2 * one, form=form, clip_high=5)
            return jnp.sum(found[0]), found[1]

        (value, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(new)
        assert float(value) == pytest.approx(-weight * 2 * math.log(9.0), rel=1e-6)
        assert float(gradient[0, 0]) == pytest.approx(-weight * 2, rel=1e-6)
        assert bool(clipped[0, 0]) is acted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(form="cispo", dual_clip=3.0), "dual_clip=3.0, but form='cispo' has none"),
        (dict(form="reinforce", ratio="sequence"), "form='reinforce' has no ratio; leave it out"),
    ],
)
def test_a_value_that_would_do_nothing_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        surrogate.check_surrogate(surrogate.Surrogate(**values))
