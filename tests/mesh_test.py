"""Mesh and rules: fallbacks, errors, arrays born sharded, constraints that really constrain."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.mesh import (
    ShardingRules,
    batch_axes,
    batch_shards,
    constrain,
    fetch_host,
    make_mesh,
    replicate,
    shard_batch,
    shard_init,
    shard_rows,
    shardings_for,
    spec_for,
)
from rlhf_jax.types import Mean

P = PartitionSpec
RULES = ShardingRules()
LAYOUTS = [{"data": 2, "tensor": 2}, {"fsdp": 4}, {"data": 4}, {"data": 2, "fsdp": 2}]


def test_make_mesh_fills_sizes_and_axes_are_auto():
    mesh = make_mesh({"data": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert dict(make_mesh({"fsdp": 4}).shape) == {"data": 1, "fsdp": 4, "tensor": 1}
    assert make_mesh({}, devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 2}, "does not fit 4 devices"),
        ({"data": 8}, "does not fit 4 devices"),
        ({"data": 3, "tensor": -1}, "does not fit 4 devices"),
        ({"data": -1, "fsdp": -1}, "at most one"),
        ({"data": 0}, "positive"),
        ({"model": 4}, r"unknown axes \['model'\]"),
    ],
)
def test_make_mesh_rejects(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(axes)


def test_specs_are_literal():
    mesh = make_mesh({"data": 2, "tensor": 2})
    assert spec_for(("vocab", "embed"), (8, 6), mesh, RULES) == P("tensor")
    assert spec_for(("batch", "length", None), (4, 5, 6), mesh, RULES) == P("data")
    assert spec_for(("length", "heads"), (5, 2), mesh, RULES) == P(None, "tensor")
    assert spec_for((), (), mesh, RULES) == P()
    mesh = make_mesh({"data": 2, "fsdp": 2})
    assert spec_for(("batch",), (4,), mesh, RULES) == P(("data", "fsdp"))
    with pytest.raises(ValueError, match="do not name"):
        spec_for(("batch",), (4, 4), mesh, RULES)


def test_a_mesh_axis_is_used_once_by_the_first_dimension():
    mesh = make_mesh({"data": 2, "fsdp": 2})
    assert spec_for(("embed", "embed"), (4, 4), mesh, RULES) == P("fsdp")
    # The batch holds fsdp already: the second dimension keeps what is left of its rule.
    assert spec_for(("batch", "embed"), (4, 4), mesh, RULES) == P(("data", "fsdp"))
    rules = ShardingRules(embed=("fsdp", "data"))
    assert spec_for(("embed", "batch"), (4, 4), mesh, rules) == P(("fsdp", "data"))


def test_an_axis_that_does_not_divide_is_replicated_and_logged_once(caplog):
    mesh = make_mesh({"tensor": 4})
    with caplog.at_level(logging.WARNING, logger="rlhf_jax.mesh"):
        for _ in range(3):
            assert spec_for(("kv_heads",), (6,), mesh, RULES) == P()
            assert spec_for(("kv_heads",), (1,), mesh, RULES) == P()
    assert [r.getMessage() for r in caplog.records] == [
        "axis 'kv_heads' of size 6 does not divide over mesh axes ('tensor',) (4 shards): "
        "replicated"
    ]


def test_a_typo_in_a_rule_is_an_error():
    mesh = make_mesh({"data": 4})
    with pytest.raises(AttributeError, match="haeds"):
        spec_for(("haeds",), (4,), mesh, RULES)
    with pytest.raises(TypeError, match="haeds"):
        ShardingRules(haeds="tensor")


def test_batch_shards():
    mesh = make_mesh({"data": 2, "fsdp": 2})
    assert batch_axes(mesh, RULES) == ("data", "fsdp") and batch_shards(mesh, RULES) == 4
    assert batch_shards(make_mesh({"tensor": 4}), RULES) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_born_sharded_with_the_numbers_of_one_device(layout):
    def init(key):
        return {"w": jax.random.normal(key, (8, 4)), "inner": {"b": jnp.ones(4)}}

    axes = {"w": ("embed", "mlp"), "inner": {"b": ("mlp",)}}
    mesh = make_mesh(layout)
    params = shard_init(init, jax.random.key(0), mesh, RULES, axes)
    fsdp = "fsdp" if mesh.shape["fsdp"] > 1 else None
    tensor = "tensor" if mesh.shape["tensor"] > 1 else None
    want = NamedSharding(mesh, P(fsdp, tensor))
    assert params["w"].sharding.is_equivalent_to(want, 2)
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert all(s.data.size == 32 // shards for s in params["w"].addressable_shards)
    np.testing.assert_array_equal(params["w"], init(jax.random.key(0))["w"])
    assert shardings_for(axes, params, mesh, RULES)["w"] == params["w"].sharding


def test_constrain_is_the_identity_without_a_mesh_or_on_one_device():
    x = jnp.ones((4, 4))
    assert constrain(x, ("batch", None), RULES) is x
    with jax.set_mesh(make_mesh({}, devices=jax.devices()[:1])):
        assert constrain(x, ("batch", None), RULES) is x


def test_constrain_gives_the_output_its_spec():
    mesh = make_mesh({"data": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        double = jax.jit(lambda x: constrain(x * 2, ("batch", "heads"), RULES))
        out = double(replicate(np.ones((4, 4), np.float32), mesh))
    assert out.sharding.spec == P("data", "tensor")


def test_constrain_drops_manual_axes_inside_shard_map():
    mesh = make_mesh({"data": 2, "tensor": 2})
    seen = []

    def local(x):
        assert x.shape == (2, 8)
        hidden = constrain(x * 2, ("batch", "heads"), RULES)
        seen.append(str(jax.make_jaxpr(lambda y: constrain(y, ("batch", "heads"), RULES))(x)))
        return hidden

    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(local, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        out = jax.jit(mapped)(shard_batch(mesh, RULES, x))
    np.testing.assert_array_equal(out, 2 * x)
    assert "sharding_constraint" in seen[0] and "'tensor'" in seen[0]
    # All axes manual: nothing is left to constrain.
    with jax.set_mesh(make_mesh({"data": 4})):
        mapped = jax.shard_map(
            lambda y: constrain(y, ("batch", "heads"), RULES),
            in_specs=P("data"),
            out_specs=P("data"),
        )
        assert "sharding_constraint" not in str(jax.make_jaxpr(mapped)(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shard_rows_fetches_each_slice_once(layout):
    mesh = make_mesh(layout)
    asked = []

    def fetch(rows):
        asked.append((rows.start, rows.stop))
        ids = np.arange(8)[rows]
        return {"ids": ids, "pair": np.stack([ids, -ids], axis=1).astype(np.float64)}

    out = shard_rows(mesh, RULES, 8, fetch)
    shards = batch_shards(mesh, RULES)
    assert asked == [(i * 8 // shards, (i + 1) * 8 // shards) for i in range(shards)]
    np.testing.assert_array_equal(out["ids"], np.arange(8))
    np.testing.assert_array_equal(out["pair"][:, 1], -np.arange(8))
    assert out["ids"].dtype == jnp.int32 and out["pair"].dtype == jnp.float32
    batch = spec_for(("batch",), (8,), mesh, RULES)
    assert out["pair"].sharding.spec == batch
    assert out["pair"].addressable_shards[0].data.shape == (8 // shards, 2)


def test_shard_batch_splits_rows_leaf_by_leaf():
    mesh = make_mesh({"data": 4})
    tree = {"rows": np.ones((8, 3)), "groups": np.arange(4), "odd": np.ones(3), "one": np.int32(5)}
    out = shard_batch(mesh, RULES, tree)
    specs = {name: leaf.sharding.spec for name, leaf in out.items()}
    assert specs == {"rows": P("data"), "groups": P("data"), "odd": P(), "one": P()}
    np.testing.assert_array_equal(fetch_host(out)["groups"], np.arange(4))


def test_replicate_and_fetch_round_trip_and_do_not_alias():
    mesh = make_mesh({"data": 2, "tensor": 2})
    mean = Mean(total=jnp.float32(3), count=jnp.float32(2))
    out = replicate(mean, mesh)
    assert out.total.sharding.is_fully_replicated and len(out.total.sharding.device_set) == 4
    jax.jit(lambda m: m, donate_argnums=0)(out)
    assert float(mean.total) == 3.0  # the source survives the copy's donation
    host = fetch_host(replicate(mean, mesh))
    assert isinstance(host.count, np.ndarray) and host.count == 2.0
