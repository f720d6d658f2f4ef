"""The data decorator: passes JAX's transformations, still rejects bad shapes when constructed."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.types import Mean, Prompts, Sampling


def prompts(n=2, p=3):
    return Prompts(
        tokens=jnp.zeros((n, p), int),
        mask=jnp.ones((n, p), bool),
        record=jnp.arange(n),
        source=jnp.zeros(n, int),
        draw=jnp.zeros(n, int),
    )


def test_tree_map_to_non_arrays_vmap_and_scan_pass():
    shapes = jax.tree.map(lambda x: str(x.shape), prompts())
    assert shapes.tokens == "(2, 3)"
    rows = jax.vmap(lambda row: row)(prompts())
    assert rows.tokens.shape == (2, 3)
    _, out = jax.lax.scan(lambda c, row: (c, row), 0, prompts())
    assert out.mask.shape == (2, 3)


def test_bad_shapes_are_rejected_at_construction():
    good = prompts()
    with pytest.raises(Exception, match="tokens"):
        Prompts(
            tokens=good.tokens[0],
            mask=good.mask,
            record=good.record,
            source=good.source,
            draw=good.draw,
        )


def test_static_fields_are_structure_and_paths_are_field_names():
    one = jnp.float32(1)
    sampling = Sampling(temperature=one, top_k=jnp.int32(0), top_p=one, min_p=one, truncates=True)
    assert len(jax.tree.leaves(sampling)) == 4
    assert jax.tree.map(lambda x: x, sampling).truncates is True
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(sampling)]
    assert paths == [".temperature", ".top_k", ".top_p", ".min_p"]


def test_frozen():
    with pytest.raises(AttributeError):
        Mean(total=jnp.float32(1), count=jnp.float32(1)).total = 2
