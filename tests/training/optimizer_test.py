"""Optimizers: schedules against their formulas, clipping, what is decayed."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.training.optimizer import make_optimizer, make_schedule


def test_schedules_have_the_documented_values():
    constant = make_schedule(2.0, warmup=4)
    np.testing.assert_allclose([constant(n) for n in range(6)], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    linear = make_schedule(2.0, "linear", warmup=2, steps=6)
    np.testing.assert_allclose([linear(n) for n in range(8)], [1, 2, 2, 1.5, 1, 0.5, 0, 0])
    cosine = make_schedule(2.0, "cosine", steps=4)
    expected = [1 + np.cos(np.pi * n / 4) for n in range(5)]
    np.testing.assert_allclose([cosine(n) for n in range(5)], expected, atol=1e-6)


def test_bad_schedules_are_named():
    with pytest.raises(ValueError, match="known: constant, cosine, linear"):
        make_optimizer(learning_rate=1.0, schedule="step")
    with pytest.raises(ValueError, match="more steps than warmup"):
        make_optimizer(learning_rate=1.0, schedule="cosine", warmup=3, steps=3)
    with pytest.raises(ValueError, match=r"clip=-1\.0"):
        make_optimizer(learning_rate=1.0, clip=-1.0)


def first_update(optimizer, params, grads):
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


def test_first_adam_step_moves_by_the_learning_rate_against_the_gradient():
    params = {"kernel": jnp.zeros(3)}
    moved = first_update(
        make_optimizer(learning_rate=0.1, clip=0.0), params, {"kernel": jnp.array([1.0, -4.0, 0])}
    )
    np.testing.assert_allclose(moved["kernel"], [-0.1, 0.1, 0.0], atol=1e-6)


def test_clipping_scales_the_whole_gradient():
    # With a large eps, Adam's first step is learning_rate * g / (|g| + eps) ~ g: visible scale.
    params = {"kernel": jnp.zeros(2)}
    optimizer = make_optimizer(learning_rate=1e3, eps=1e3, clip=1.0)
    moved = first_update(optimizer, params, {"kernel": jnp.array([30.0, 40.0])})
    np.testing.assert_allclose(moved["kernel"], [-0.6, -0.8], rtol=1e-2)


def test_weight_decay_leaves_scales_and_biases_alone():
    leaves = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones((3, 2))}
    params = {"layers": leaves, "embed": {"table": jnp.ones((2, 2))}}
    zeros = {
        "layers": {name: jnp.zeros_like(x) for name, x in leaves.items()},
        "embed": {"table": jnp.zeros((2, 2))},
    }
    moved = first_update(make_optimizer(learning_rate=0.1, weight_decay=0.5), params, zeros)
    np.testing.assert_allclose(moved["layers"]["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_allclose(moved["embed"]["table"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(moved["layers"]["bias"], 1.0)
    np.testing.assert_array_equal(moved["layers"]["scale"], 1.0)
