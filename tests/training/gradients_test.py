"""One optimizer step on a linear problem, whose gradients are known by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.ops.groups import split_chunks
from rlhf_jax.ops.masking import mean_of
from rlhf_jax.training.gradients import Carry, Problem, count_terms, descend, union
from rlhf_jax.types import Term

MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
X = np.arange(12, dtype=np.float32).reshape(4, 3) / 10


def problem():
    """Role "a" is fitted to x·a = 1 over the mask, role "b" to b = x over the first column."""

    def forward(params, chunk):
        return {"a": params["a"]["w"] * chunk["x"], "b": params["b"]["w"] - chunk["x"][:, 0]}

    def loss(output, chunk):
        first = chunk["mask"][:, 0]
        terms = {
            "a": Term(weight=2.0, mean=mean_of(jnp.square(output["a"] - 1), chunk["mask"])),
            "b": Term(weight=1.0, mean=mean_of(jnp.square(output["b"]), first)),
            "never": Term(weight=1.0, mean=mean_of(output["b"], first & False)),
        }
        return terms, {"toy/rows": mean_of(first, first)}

    return Problem(forward, loss, lambda grads: grads)


def start(optimizers, dtype=jnp.float32, lr_scale=1.0):
    params = {role: {"w": jnp.full((), 0.5, dtype)} for role in ("a", "b")}
    opt_state = {role: optimizers[role].init(params[role]) for role in params}
    return Carry(params, opt_state, jnp.zeros((), jnp.int32), jnp.float32(lr_scale))


@functools.partial(jax.jit, static_argnums=1)
def step(carry, microbatches, x):
    chunks = split_chunks({"x": x, "mask": jnp.asarray(MASK)}, microbatches)
    return descend(problem(), OPTIMIZERS, carry, chunks)


OPTIMIZERS = {"a": optax.sgd(0.1), "b": optax.sgd(0.01, momentum=0.9)}


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_the_step_is_the_hand_made_gradient_of_each_role(microbatches):
    carry, metrics = step(start(OPTIMIZERS), microbatches, X)
    x, first = X[MASK], X[MASK[:, 0], 0]
    gradient_a = 2 * np.mean(2 * (0.5 * x - 1) * x)
    gradient_b = np.mean(2 * (0.5 - first))
    np.testing.assert_allclose(carry.params["a"]["w"], 0.5 - 0.1 * gradient_a, rtol=1e-6)
    np.testing.assert_allclose(carry.params["b"]["w"], 0.5 - 0.01 * gradient_b, rtol=1e-6)
    loss = 2 * np.mean((0.5 * x - 1) ** 2) + np.mean((0.5 - first) ** 2)
    value = {name: (float(m.total), float(m.count)) for name, m in metrics.items()}
    assert value["update/loss"] == (pytest.approx(loss, rel=1e-6), 1.0)
    assert value["loss/a"] == (pytest.approx(np.sum((0.5 * x - 1) ** 2), rel=1e-6), 6.0)
    assert value["a/grad_norm"] == (pytest.approx(abs(gradient_a), rel=1e-6), 1.0)
    assert value["b/grad_norm"] == (pytest.approx(abs(gradient_b), rel=1e-6), 1.0)
    assert value["update/terms_empty"] == (1.0, 1.0) and value["loss/never"] == (0.0, 0.0)
    assert value["update/skipped"] == (0.0, 1.0) and value["toy/rows"] == (3.0, 3.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_leaves_everything_as_it_was_and_the_next_step_moves(bad):
    carry, _ = step(start(OPTIMIZERS), 2, X)
    spoiled = X.copy()
    spoiled[3, 1] = bad
    after = carry
    for count in (1, 2):
        after, metrics = step(after, 2, spoiled)
        assert int(after.skipped) == count
        assert float(metrics["update/skipped"].total) == 1
    for new, old in zip(jax.tree.leaves(after[:2]), jax.tree.leaves(carry[:2]), strict=True):
        np.testing.assert_array_equal(new, old)
    after, metrics = step(after, 2, X)
    assert int(after.skipped) == 0 and float(metrics["update/skipped"].total) == 0
    assert float(after.params["a"]["w"]) != float(carry.params["a"]["w"])


def test_bfloat16_parameters_keep_their_type_and_that_of_their_statistics():
    before = start(OPTIMIZERS, jnp.bfloat16)
    after, _ = step(before, 4, X.astype(jnp.bfloat16))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)


@pytest.mark.parametrize("lr_scale", [0.0, 0.5, 1.0])
def test_updates_are_scaled_and_statistics_are_not(lr_scale):
    before = start(OPTIMIZERS, lr_scale=lr_scale)
    after, _ = step(before, 2, X)
    whole, _ = step(start(OPTIMIZERS), 2, X)
    for role in OPTIMIZERS:
        moved = np.float32(whole.params[role]["w"]) - np.float32(0.5)
        np.testing.assert_allclose(after.params[role]["w"], 0.5 + lr_scale * moved, rtol=1e-6)
    for new, old in zip(
        jax.tree.leaves(after.opt_state), jax.tree.leaves(whole.opt_state), strict=True
    ):
        np.testing.assert_array_equal(new, old)
    if lr_scale == 0:
        assert float(after.params["a"]["w"]) == 0.5  # exactly: the very same bits
    assert float(after.lr_scale) == lr_scale


def test_counts_do_not_run_the_model():
    chunks = split_chunks({"x": jnp.full_like(X, jnp.nan), "mask": jnp.asarray(MASK)}, 2)
    params = {"a": {"w": jnp.float32(jnp.nan)}, "b": {"w": jnp.float32(jnp.inf)}}
    counts = count_terms(problem(), params, chunks)
    assert {name: float(c) for name, c in counts.items()} == {"a": 6.0, "b": 3.0, "never": 0.0}


def test_a_metric_that_is_named_twice_is_an_error():
    with pytest.raises(ValueError, match="named twice: loss"):
        union({"loss": 1, "a": 2}, {"loss": 3})
