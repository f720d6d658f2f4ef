"""Work in parts that are written as they are done, so that a run that was killed goes on.

A part is a JSONL file in the folder ``parts/`` of a run, there whole or not at all. Parts are done
in order, and which work belongs to which must depend on the config alone.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped, UInt32

from rlhf_jax import run_folder
from rlhf_jax.training.writer import write_json, write_parts
from rlhf_jax.types import Array, Params

Lines = list[dict[str, Any]]


def open_parts(folder: pathlib.Path, fingerprint: str) -> pathlib.Path:
    """The folder of a run's parts, made by process 0 if need be.

    Args:
        fingerprint: of the input that the parts are made from and no config names.

    Raises:
        ValueError: the parts there are of other input.
    """
    parts = folder / "parts"
    path = parts / "input.json"
    if run_folder.agreed(path.is_file()):
        before = json.loads(read_shared(path))["sha256"]
        if before != fingerprint:
            raise ValueError(
                f"{parts} holds work on other solutions, or by another policy, than those of now "
                f"(sha256 {before[:12]} there, {fingerprint[:12]} now); use a new workdir"
            )
    elif jax.process_index() == 0:
        parts.mkdir(exist_ok=True)
        write_json(path, {"sha256": fingerprint})
    run_folder.barrier("parts opened")
    return parts


def weights_digest(params: Params) -> str:
    """A digest of weights: the same for the same bits, on any mesh; for others almost surely not.

    Each leaf gives  Σ_i bits_i · (2i + 1)  modulo 2^32, i counted along every axis with a factor
    of its own: integers add up to the same in any order. A folder that was trained anew has other
    weights and the same name.
    """
    sums = jax.device_get(jax.tree.map(_bit_sum, params))
    named = jax.tree_util.tree_leaves_with_path(sums)
    lines = (f"{jax.tree_util.keystr(path)} {int(total)}" for path, total in named)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@jax.jit
def _bit_sum(leaf: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = jax.lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize]).astype(jnp.uint32)
    places = (
        jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        * jnp.uint32(2 * pow(10007, axis, 2**31))
        for axis in range(leaf.ndim)
    )
    place = functools.reduce(jnp.add, places, jnp.ones(leaf.shape, jnp.uint32))
    return jnp.sum(bits * place, dtype=jnp.uint32)


def through_parts(
    parts: pathlib.Path, kind: str, work: Callable[[int], Iterator[Lines]]
) -> Iterator[tuple[bool, Lines]]:
    """The lines of every part of one kind, and whether they were made now.

    Args:
        work: gives the lines of each part from the n-th on; called once, with the number of parts
            that are there already. On every process, which must all say the same.
    """
    ready = 0
    while run_folder.agreed(_path(parts, kind, ready).is_file()):
        yield False, _read(_path(parts, kind, ready))
        ready += 1
    for number, lines in enumerate(work(ready), ready):
        if jax.process_index() == 0:
            written = (json.dumps(line, sort_keys=True) + "\n" for line in lines)
            write_parts(_path(parts, kind, number), written)
        yield True, lines


def _read(path: pathlib.Path) -> Lines:
    try:
        return [json.loads(line) for line in read_shared(path).splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is broken ({error}); delete it and the parts behind it to do their work again"
        ) from error


def _path(parts: pathlib.Path, kind: str, number: int) -> pathlib.Path:
    return parts / f"{kind}-{number:05d}.jsonl"


def read_shared(path: pathlib.Path) -> str:
    """A file of process 0 as text on every process, which may not see its disk."""
    if jax.process_count() == 1:
        return path.read_text(encoding="utf-8")
    mine = jax.process_index() == 0
    content = np.frombuffer(path.read_bytes() if mine else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(content))))
    if not mine:
        content = np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(content))).decode("utf-8")
