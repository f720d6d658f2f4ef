"""Optimizers: schedules against their formulas, clipping, what is decayed, what is kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.training.gradients import Carry, apply_gradients
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


def random_tree(seed, width=3):
    rng = np.random.default_rng(seed)
    draw = {"kernel": rng.normal(size=(width, 5)), "scale": rng.normal(size=width)}
    return {name: jnp.asarray(x, jnp.float32) for name, x in draw.items()}


def test_the_optimizer_is_adamw_behind_a_clip():
    rate = make_schedule(0.1, "cosine", warmup=2, steps=6)
    ours = make_optimizer(
        learning_rate=0.1, schedule="cosine", warmup=2, steps=6, weight_decay=0.3, eps=1e-3
    )
    decayed = {"kernel": True, "scale": False}
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.3, mask=decayed),
    )
    params = {name: random_tree(0) for name in ("ours", "theirs")}
    states = {"ours": ours.init(params["ours"]), "theirs": theirs.init(params["theirs"])}
    for step in range(5):
        for name, optimizer in (("ours", ours), ("theirs", theirs)):
            grads = random_tree(step + 1)
            updates, states[name] = optimizer.update(grads, states[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
    for name in decayed:
        np.testing.assert_allclose(params["ours"][name], params["theirs"][name], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        jax.tree.leaves(states["ours"]),
        jax.tree.leaves(states["theirs"]),
    )


def test_moments_stay_where_a_step_is_not_accepted():
    optimizer = make_optimizer(learning_rate=0.1)
    params = random_tree(0)
    _, before = optimizer.update(random_tree(1), optimizer.init(params), params)
    bad = jax.tree.map(lambda g: g * jnp.nan, random_tree(2))
    _, after = optimizer.update(bad, before, params, accept=jnp.array(False))
    (_, old), (_, new) = before, after
    jax.tree.map(np.testing.assert_array_equal, new[0], old[0])
    _, other = optimizer.update(random_tree(2), before, params, accept=jnp.array(True))
    assert not np.array_equal(other[1][0].mu["kernel"], old[0].mu["kernel"])


def copies_of_moments(optimizer):
    """How many arrays of a parameter's size a compiled step of its own copies."""
    width = 64
    params = random_tree(0, width)
    carry = Carry({"a": params}, {"a": optimizer.init(params)}, jnp.int32(0), jnp.float32(1))

    def step(carry, grads):
        return apply_gradients({"a": optimizer}, carry, {"a": grads}, jnp.float32(0), {})[0]

    program = jax.jit(step, donate_argnums=0).lower(carry, random_tree(1, width)).compile()
    return len(re.findall(rf"f32\[{width},5\]\S* copy\(", program.as_text()))


def test_no_moment_is_copied_before_it_is_written():
    assert copies_of_moments(make_optimizer(learning_rate=0.1)) == 0
    # XLA does so of its own when parameters are made from the old moments.
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    assert copies_of_moments(plain) == 2


def test_a_wrapper_that_hands_nothing_on_leaves_its_moments_too():
    inner = make_optimizer(learning_rate=0.1)
    wrapper = optax.GradientTransformation(inner.init, lambda g, s, p=None: inner.update(g, s, p))
    params = random_tree(0)
    before = Carry({"a": params}, {"a": wrapper.init(params)}, jnp.int32(0), jnp.float32(1))
    bad = jax.tree.map(lambda g: g * jnp.nan, random_tree(1))
    after, _ = apply_gradients({"a": wrapper}, before, {"a": bad}, jnp.float32(0), {})
    assert int(after.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, after[:2], before[:2])
