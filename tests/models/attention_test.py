"""Attention in blocks of queries: the numbers and gradients of attention as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.attention import attention, blocks_of, causal_attention
from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from tests.models.batches import plain

N, K, S, P, G, R, DH = 2, 2, 11, 3, 2, 2, 4


def inputs(prefix: bool, window: int):
    """Arguments of attention for rows of which the second starts with padding."""
    draw = np.random.default_rng(0).normal
    rows = N * K
    query = draw(size=(rows, S, G, R, DH)).astype(np.float32)
    keys, values = draw(size=(2, rows, G, S, DH)).astype(np.float32)
    column, place = np.arange(S)[None], np.arange(S)[:, None]
    seen = (column <= place) & (column > place - window)
    attend = np.repeat(seen[None], rows, axis=0)
    attend[1] &= column >= 2
    shared = None
    if prefix:
        shared = tuple(draw(size=(2, N, G, P, DH)).astype(np.float32))
        attend = np.concatenate([np.ones((rows, S, P), bool), attend], axis=2)
    return query, keys, values, shared, attend


def both_ways(blocks, prefix, window, softcap):
    """Results and gradients: as a whole, and in blocks."""
    *differentiated, attend = inputs(prefix, window)
    read = np.any(attend, axis=2)[:, :, None, None, None]  # nobody reads rows that see nothing
    weight = np.random.default_rng(1).normal(size=(N * K, S, G, R, DH)).astype(np.float32)

    def of(function, **options):
        def loss(query, keys, values, shared):
            out = function(query, keys, values, attend, prefix=shared, softcap=softcap, **options)
            out = jnp.where(read, out, 0.0)
            return jnp.sum(out * weight), out

        return jax.jit(jax.grad(loss, range(4 if prefix else 3), has_aux=True))(*differentiated)

    return of(attention), of(causal_attention, blocks=blocks)


@pytest.mark.parametrize(
    ("blocks", "prefix", "window", "softcap"),
    [(1, False, S, 0.0), (2, True, S, 0.0), (3, False, 4, 5.0), (4, True, 4, 0.0)],
)
def test_blocks_change_no_number(blocks, prefix, window, softcap):
    whole, parts = both_ways(blocks, prefix, window, softcap)
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)


def test_blocks_multiply_less():
    query, keys, values, _, attend = inputs(prefix=False, window=S)

    def products(blocks):
        def run(*args):
            return causal_attention(*args, attend, blocks=blocks)

        text = str(jax.make_jaxpr(run)(query, keys, values))
        return text.count("dot_general"), jax.jit(run).lower(query, keys, values).cost_analysis()

    (one, whole), (many, parts) = products(1), products(4)
    assert (one, many) == (2, 8)
    assert parts["flops"] < 0.7 * whole["flops"]  # 1 - 3/8 of the products


@pytest.mark.parametrize(
    ("size", "blocks"), [(1, 1), (64, 1), (127, 1), (128, 2), (192, 3), (256, 4), (8192, 4)]
)
def test_how_many_blocks(size, blocks):
    assert blocks_of(size) == blocks


@pytest.mark.parametrize("length", [None, "fsdp"])
def test_a_length_on_several_devices_stays_whole(length):
    config = named_size("tiny")
    rules = ShardingRules(length=length, batch=None, embed=None)
    model = decoder(config, rules)
    with jax.set_mesh(make_mesh({}, devices=jax.devices()[:1])):
        text = str(jax.make_jaxpr(model.apply)(model.shapes(), *plain(2, 128)))
    each = config.heads // config.kv_heads

    def scores(rows, seen):
        return text.count(f"f32[2,{config.kv_heads},{each * rows},{seen}] = dot_general")

    found = [scores(128, 128), scores(64, 64), scores(64, 128)]
    assert found == ([0, 1, 1] if length is None else [1, 0, 0])
