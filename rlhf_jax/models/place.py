"""Putting published tensors where our leaves live, without a second copy of a model on the host.

A view of a mapped file becomes our leaf by a transpose and a cast, and layers are stacked. On
accelerators the view goes to the devices as it lies in the file, each taking only its own part, and
is turned there, one layer at a time. Where the devices are the host's own cores, the leaf's memory
is filled directly from the file and then *is* the array.
"""

import concurrent.futures
import functools
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_ALIGNED = 64  # bytes; what XLA wants of host memory that it is to use as it is
_TILE = 32  # rows of a block that is transposed within the processor's cache
_JOB = 256  # rows of a thread's piece of work


def place_leaf(
    views: Sequence[np.ndarray],
    axes: tuple[int, ...],
    leaf: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
    *,
    on_host: bool | None = None,
) -> jax.Array:
    """One leaf of shape and type `leaf`: ``view.transpose(axes)``, stacked if there are layers.

    Args:
        views: one, or one per layer for a leaf with an axis more.
        on_host: fill host memory instead of turning on the devices; None decides by the platform.
    """
    if on_host is None:
        on_host = sharding.mesh.devices.flat[0].platform == "cpu"
    # A single number is not worth it, and has no axes to go by.
    if on_host and axes and all(view.dtype == leaf.dtype for view in views):
        return _fill_host(views, axes, leaf, sharding)
    if len(leaf.shape) == len(axes):
        source = _to_devices(views[0], _turned(sharding, axes))
        return _turner(axes, leaf.dtype, sharding)(source)
    single = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    for layer, view in enumerate(views):
        source = _to_devices(view, _turned(single, axes))
        stack = _placer(axes, sharding)(stack, source, np.int32(layer))
        jax.block_until_ready(stack)  # or sources would pile up
    return stack


def _turned(sharding: NamedSharding, axes: tuple[int, ...]) -> NamedSharding:
    """The sharding of a view whose transpose by `axes` has `sharding`."""
    spec = [None] * len(axes)
    for entry, axis in zip(sharding.spec, axes, strict=False):
        spec[axis] = entry
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _to_devices(view: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A view of a file on the devices, in the file's type; float64, which they lack, as float32."""

    def fetch(index):
        part = np.require(view[index], requirements=["C_CONTIGUOUS", "ALIGNED"])
        return part.astype(np.float32) if part.dtype == np.float64 else part

    return jax.make_array_from_callback(view.shape, sharding, fetch)


# Cached, so that leaves that lie alike (key and value, gate and up) share a compiled program.
@functools.cache
def _turner(axes: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding):
    """view -> the leaf."""
    return jax.jit(lambda view: jnp.transpose(view, axes).astype(dtype), out_shardings=sharding)


@functools.cache
def _placer(axes: tuple[int, ...], sharding: NamedSharding):
    """(stack, view, layer) -> the stack with one more layer in its place, in the same memory."""

    def place(stack, view, layer):
        turned = jnp.transpose(view, axes).astype(stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, turned, layer, 0)

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


def _fill_host(views, axes, leaf, sharding) -> jax.Array:
    stacked = len(leaf.shape) > len(axes)

    def fetch(index):
        layers = range(*index[0].indices(len(views))) if stacked else [0]
        ours = index[1:] if stacked else index
        theirs = [slice(None)] * len(axes)
        for place, axis in zip(ours, axes, strict=True):
            theirs[axis] = place
        parts = [views[layer][tuple(theirs)] for layer in layers]
        shape = tuple(parts[0].shape[axis] for axis in axes)
        out = _empty((len(parts), *shape), leaf.dtype)
        _copy_all(out, parts, axes)
        return out if stacked else out[0]

    return jax.make_array_from_callback(leaf.shape, sharding, fetch)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Host memory that XLA takes as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy_all(out: np.ndarray, parts: Sequence[np.ndarray], axes: tuple[int, ...]) -> None:
    """out[i] = parts[i].transpose(axes) on all cores; as bits, which numpy copies unlocked."""
    bits = np.dtype(f"u{out.dtype.itemsize}")
    lead = axes.index(0)  # axes that lay behind and come to the front
    jobs = []
    for whole, part in zip(out.view(bits), (part.view(bits) for part in parts), strict=True):
        kept = len(axes) - lead if lead else 1  # where nothing is turned, rows are whole
        rows = math.prod(part.shape[:kept])
        source = part.reshape(rows, -1)
        target = whole.reshape(-1, rows).T if lead else whole.reshape(rows, -1)
        jobs += [(target[i : i + _JOB], source[i : i + _JOB]) for i in range(0, rows, _JOB)]
    with concurrent.futures.ThreadPoolExecutor(_cores()) as pool:
        for _ in pool.map(lambda job: _copy_tiles(*job), jobs):
            pass


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _copy_tiles(target: np.ndarray, source: np.ndarray) -> None:
    for at in range(0, len(source), _TILE):
        target[at : at + _TILE] = source[at : at + _TILE]
