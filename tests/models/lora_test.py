"""Adapters: fresh ones change nothing, folded ones equal applied ones, trees cut and join."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import PROJECTIONS, named_size
from rlhf_jax.models.lora import join, merge_lora, partition
from rlhf_jax.models.transformer import decoder
from tests.models.batches import plain, tiny

LORA = dict(lora_rank=3, lora_alpha=6.0, qkv_bias=True, score_heads=("outcome",))


def paths(tree):
    return {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)}


def base_of(model):
    return decoder(dataclasses.replace(model.config, lora_rank=0, score_heads=()))


def hidden_of(model, params):
    return jax.jit(model.apply)(params, *plain(2, 9), None).hidden


def test_fresh_adapters_equal_the_base_and_the_frozen_tree_is_the_reference():
    model = decoder(named_size("tiny", **LORA))
    params = jax.jit(model.init)(jax.random.key(0))
    _, frozen = partition(params, model.config)
    want = hidden_of(base_of(model), frozen)
    np.testing.assert_allclose(hidden_of(model, params), want, rtol=0, atol=1e-6)


def test_partition_cuts_adapters_and_heads_from_the_base():
    model, params = tiny(**LORA)
    trainable, frozen = partition(params, model.config)
    assert paths(trainable) | paths(frozen) == paths(params)
    assert not paths(trainable) & paths(frozen)
    assert {p.split("'")[-2] for p in paths(trainable)} == {"lora_a", "lora_b", "kernel"}
    assert all("lora" in p or p.startswith("['heads']") for p in paths(trainable))
    assert not any("lora" in p or "heads" in p for p in paths(frozen))
    assert len(paths(trainable)) == 2 * len(PROJECTIONS) + 1
    jax.tree.map(np.testing.assert_array_equal, join(trainable, frozen), params)
    # The base belongs to a plain model of the same size.
    base = base_of(model)
    shapes = jax.eval_shape(base.init, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(frozen)


def test_without_adapters_everything_trains():
    model, params = tiny()
    trainable, frozen = partition(params, model.config)
    assert trainable is params and frozen == {}
    assert jax.tree.structure(join(trainable, frozen)) == jax.tree.structure(params)
    assert merge_lora(params, model.config) is params


def test_join_rejects_a_leaf_of_both_trees():
    with pytest.raises(ValueError, match="both trees hold a/b"):
        join({"a": {"b": 1}}, {"a": {"b": 2}})


@pytest.mark.parametrize("targets", [PROJECTIONS, ("query", "value")])
def test_folded_adapters_equal_applied_ones(targets):
    model, params = tiny(**LORA, lora_targets=targets)
    folded = merge_lora(params, model.config)
    assert not any("lora" in p for p in paths(folded))
    plain_model = decoder(dataclasses.replace(model.config, lora_rank=0))
    got = hidden_of(plain_model, folded)
    np.testing.assert_allclose(got, hidden_of(model, params), rtol=0, atol=1e-5)
    bare = hidden_of(base_of(model), partition(params, model.config)[1])
    assert float(jnp.abs(got - bare).max()) > 1e-3  # the adapters do something
    unstacked = merge_lora(model.unstack(params), model.config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        unstacked,
        plain_model.unstack(folded),
    )


def test_folding_is_literal():
    model, params = tiny(lora_rank=1, lora_alpha=2.0, lora_targets=("down",))
    down = params["layers"]["mlp"]["down"]
    folded = merge_lora(params, model.config)["layers"]["mlp"]["down"]["kernel"]
    for i in range(2):
        want = down["kernel"][i] + 2.0 * np.outer(down["lora_a"][i], down["lora_b"][i])
        np.testing.assert_allclose(folded[i], want, atol=1e-7)
