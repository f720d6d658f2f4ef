"""All sharding knowledge: the mesh, rules from logical axes to mesh axes, arrays born sharded.

Models name the axes of their arrays by role ("heads", "embed"); `ShardingRules` says on which
mesh axes a role lies. A rule that cannot be kept for one array (the axis does not divide, or
the mesh axis is already used by an earlier dimension) means replication, never an error: a
scalar head or two key/value heads on four devices are ordinary cases.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.types import Params

AXES = ("data", "fsdp", "tensor")
LogicalAxes = tuple[str | None, ...]
MeshAxes = str | tuple[str, ...] | None

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """One field per logical axis: the mesh axis or axes that split it, or None (replicated)."""

    batch: MeshAxes = ("data", "fsdp")
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    mlp: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    layers: MeshAxes = None
    length: MeshAxes = None
    rank: MeshAxes = None
    members: MeshAxes = None
    score: MeshAxes = None


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes ``data``, ``fsdp`` and ``tensor`` over all devices.

    Args:
        axes: sizes; a missing axis has size 1, one axis may be -1 (all remaining devices).
        devices: the devices to use instead of all.

    Raises:
        ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise ValueError(f"mesh has unknown axes {unknown}; known: {list(AXES)}")
    sizes = {name: axes.get(name, 1) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes are {sizes}; want positive sizes, at most one of them -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"mesh {dict(axes)} does not fit {count} devices: the product of the sizes must be "
            f"{count}; set one axis to -1 to let it take the rest"
        )
    # Auto, because the default (Explicit) turns sharding constraints into assertions.
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


@functools.cache
def _log_replicated(name: str, size: int, axes: tuple[str, ...], shards: int):
    _log.warning(
        "axis %r of size %d does not divide over mesh axes %s (%d shards): replicated",
        name,
        size,
        axes,
        shards,
    )


def _rule_axes(rules: ShardingRules, name: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis; an unknown name is an AttributeError."""
    rule = getattr(rules, name)
    if rule is None:
        return ()
    return (rule,) if isinstance(rule, str) else tuple(rule)


def spec_for(
    logical: LogicalAxes,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: ShardingRules,
) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names.

    An axis that does not divide is replicated (logged once, unless its size is 1); a mesh axis
    that an earlier dimension uses is dropped from later ones. Mesh axes of size 1 and trailing
    None are left out, as in the specs that compiled programs return: otherwise the same layout
    would have two names and a second call could compile again.
    """
    if len(logical) != len(shape):
        raise ValueError(f"logical axes {logical} do not name the dimensions of shape {shape}")
    used: set[str] = set()
    entries: list[MeshAxes] = []
    for name, size in zip(logical, shape, strict=True):
        rule = () if name is None else _rule_axes(rules, name)
        axes = tuple(a for a in rule if mesh.shape[a] > 1 and a not in used)
        shards = math.prod(mesh.shape[a] for a in axes)
        if size % shards != 0:
            if size > 1:  # of one there is nothing to split
                _log_replicated(name, size, axes, shards)
            axes = ()
        used.update(axes)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _is_logical(node: Any) -> bool:
    return isinstance(node, tuple) and all(n is None or isinstance(n, str) for n in node)


def shardings_for(axes: Any, shapes: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """A tree of shardings from a tree of logical axes and one of arrays or their shapes."""

    def sharding(logical, leaf):
        return NamedSharding(mesh, spec_for(logical, leaf.shape, mesh, rules))

    return jax.tree.map(sharding, axes, shapes, is_leaf=_is_logical)


def shard_init(
    init: Callable[[jax.Array], Params],
    key: jax.Array,
    mesh: Mesh,
    rules: ShardingRules,
    axes: Any,
) -> Params:
    """Parameters that are born sharded: no device ever holds the whole tree.

    Args:
        axes: the logical axes of every leaf, as `Model.axes()` gives them.
    """
    shardings = shardings_for(axes, jax.eval_shape(init, key), mesh, rules)
    return jax.jit(init, out_shardings=shardings)(key)


def constrain(x: jax.Array, logical: LogicalAxes, rules: ShardingRules) -> jax.Array:
    """Pins the layout of an activation under the ambient mesh (``jax.set_mesh``).

    Without a mesh, or on one device, this is the identity. Inside ``shard_map`` the manual
    axes are already split, so only the axes left to the compiler are named.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    auto = {name for name, kind in types.items() if kind == AxisType.Auto}
    if not any(mesh.shape[name] > 1 for name in auto):
        return x
    allowed = ShardingRules(
        **{
            field.name: tuple(a for a in _rule_axes(rules, field.name) if a in auto)
            for field in dataclasses.fields(rules)
        }
    )
    return jax.lax.with_sharding_constraint(x, spec_for(logical, x.shape, mesh, allowed))


def batch_axes(mesh: Mesh, rules: ShardingRules) -> tuple[str, ...]:
    """The mesh axes over which rows of a batch are split."""
    return tuple(a for a in _rule_axes(rules, "batch") if a in mesh.shape)


def batch_shards(mesh: Mesh, rules: ShardingRules) -> int:
    """Into how many shards the rows of a batch are split."""
    return math.prod(mesh.shape[a] for a in batch_axes(mesh, rules))


def _rows_sharding(mesh: Mesh, rules: ShardingRules, rows: int) -> NamedSharding:
    return NamedSharding(mesh, spec_for(("batch",), (rows,), mesh, rules))


def _canonical(leaf: Any) -> np.ndarray:
    """Host arrays in the types that devices hold (64-bit to 32-bit unless enabled)."""
    leaf = np.asarray(leaf)
    return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)


def shard_rows(mesh: Mesh, rules: ShardingRules, rows: int, fetch: Callable[[slice], Any]) -> Any:
    """A global batch of which each process fetches only the rows of its own devices.

    Args:
        rows: rows of the global batch.
        fetch: gives a tree of numpy arrays, leading axis = the rows of the slice. It is called
            once per distinct slice of this process, in ascending order.
    """
    sharding = _rows_sharding(mesh, rules, rows)
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    spans = sorted({index[0].indices(rows)[:2] for index in indices})
    parts = {span: jax.tree.map(_canonical, fetch(slice(*span))) for span in spans}
    leaves = {span: jax.tree.leaves(part) for span, part in parts.items()}

    def build(place: int, example: np.ndarray) -> jax.Array:
        shape = (rows, *example.shape[1:])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: leaves[index[0].indices(rows)[:2]][place]
        )

    examples, structure = jax.tree.flatten(parts[spans[0]])
    return jax.tree.unflatten(structure, [build(i, leaf) for i, leaf in enumerate(examples)])


def shard_batch(mesh: Mesh, rules: ShardingRules, tree: Any) -> Any:
    """A global batch from a host batch that is complete, and equal, on every process.

    The leading axis of each leaf is split as rows of a batch; scalars are replicated.
    """

    def place(leaf):
        leaf = _canonical(leaf)
        logical = ("batch",)[: leaf.ndim] + (None,) * (leaf.ndim - 1)
        sharding = NamedSharding(mesh, spec_for(logical, leaf.shape, mesh, rules))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies of all leaves on every device of the mesh (values equal on every process)."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = _canonical(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def fetch_host(tree: Any) -> Any:
    """Whole numpy arrays on every process; a collective where a leaf spans processes."""

    def fetch(leaf):
        spans = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if spans and not leaf.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
