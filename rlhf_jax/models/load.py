"""A Hugging Face folder -> our config and sharded parameters, tensor by tensor.

Files are mapped, not read: each device's callback touches only the bytes of its own shard, so
no process ever holds a whole model. The safetensors format is 8 bytes of header length, a JSON
header and raw little-endian tensors (https://github.com/huggingface/safetensors).
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from jaxtyping import Key

from rlhf_jax.mesh import ShardingRules, shardings_for
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.llama import Family, llama
from rlhf_jax.models.qwen import qwen2, qwen3
from rlhf_jax.models.transformer import decoder
from rlhf_jax.types import Params

# model_type in config.json -> family
FAMILIES = MappingProxyType({"llama": llama, "qwen2": qwen2, "qwen3": qwen3})
DTYPES = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
    }
)
# Leaves that published checkpoints do not hold and `load_hf` makes itself.
FRESH = ("heads/", "lora_")


def open_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of one .safetensors file as a lazy view of the mapped file."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if data.size < 8 or start > data.size:
        raise ValueError(f"{path} is no safetensors file, or cut short")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name} is {entry['dtype']}; wanted one of {', '.join(DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        if start + end > data.size:
            raise ValueError(f"{path} is cut short: {name} ends at byte {start + end}")
        raw = data[start + begin : start + end]
        tensors[name] = raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def open_folder(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of model.safetensors, or of all the files that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        there = sorted(path.name for path in folder.iterdir())
        raise ValueError(f"{folder} lacks {', '.join(absent)}; it holds {there}")
    tensors = {}
    for name in names:
        tensors.update(open_tensors(folder / name))
    return tensors


def _read_family(folder: pathlib.Path, overrides: Mapping[str, Any]) -> tuple[ModelConfig, Family]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; wanted a Hugging Face model folder")
    published = json.loads(path.read_text())
    kind = published.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type={kind!r}; known are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]()
    return ModelConfig(**{**family.fields(published), **overrides}), family


def read_hf_config(
    folder: str | pathlib.Path, overrides: Mapping[str, Any] = MappingProxyType({})
) -> ModelConfig:
    """The config of a Hugging Face folder.

    Args:
        overrides: fields of `ModelConfig` that replace what the folder says.
    """
    return _read_family(pathlib.Path(folder), overrides)[0]


def as_ours(tensor: np.ndarray, path: str, shape: tuple[int, ...], published: str) -> np.ndarray:
    """A published tensor in our layout, still a view.

    Published kernels are [out, in]; ours keep inputs first and heads as an axis of their own:
    query [D H Dh], output [H Dh D], gate [D F].
    """
    if path.endswith("/kernel"):
        inputs = len(shape) - 1 if path.endswith("output/kernel") else 1
        wanted = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        view = shape[inputs:] + shape[:inputs]
        axes = (*range(len(shape) - inputs, len(shape)), *range(len(shape) - inputs))
    else:
        wanted = shape if path.endswith("/table") else (math.prod(shape),)
        view, axes = shape, tuple(range(len(shape)))
    if tensor.shape != wanted:
        raise ValueError(f"{published} is {tensor.shape} in the file; the config wants {wanted}")
    return tensor.reshape(view).transpose(axes)


def _check_names(
    tensors: Mapping[str, np.ndarray], wanted: Iterable[str], known: Iterable[str]
) -> None:
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise ValueError(f"the files lack {len(missing)} tensors: {', '.join(missing[:8])}")
    # A weight left behind means another architecture than the config says.
    unused = sorted(set(tensors) - set(known))
    unused = [name for name in unused if not name.endswith("rotary_emb.inv_freq")]
    if unused:
        raise ValueError(f"no place for {len(unused)} tensors: {', '.join(unused[:8])}")


def _published(name: str, layers: int) -> list[str]:
    """The published names of one leaf: one, or one per layer where layers are stacked."""
    return [name.format(layer=layer) for layer in range(layers)] if "{layer}" in name else [name]


def _load_leaf(tensors, names, path, leaf, sharding) -> jax.Array:
    stacked = path.startswith("layers/")
    shape = leaf.shape[1:] if stacked else leaf.shape
    views = [as_ours(tensors[name], path, shape, name) for name in names]

    def fetch(index):
        if not stacked:
            return np.ascontiguousarray(views[0][index]).astype(leaf.dtype)
        # Copied layer by layer before the cast: mapped bytes need not be aligned.
        rows = [np.ascontiguousarray(view[index[1:]]) for view in views[index[0]]]
        return np.stack([row.astype(leaf.dtype) for row in rows])

    return jax.make_array_from_callback(leaf.shape, sharding, fetch)


def _fresh_leaves(model, paths, key, shardings) -> dict[str, jax.Array]:
    if not paths:
        return {}
    if key is None:
        raise ValueError(f"the folder holds no {', '.join(paths[:4])}; pass `key` to draw them")

    def init(key):
        # The compiler drops whatever else the model would have drawn.
        leaves = traverse_util.flatten_dict(model.init(key), sep="/")
        return {path: leaves[path] for path in paths}

    return jax.jit(init, out_shardings={path: shardings[path] for path in paths})(key)


def load_hf(
    folder: str | pathlib.Path,
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
    *,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    key: Key[jax.Array, ""] | None = None,
) -> tuple[ModelConfig, Params]:
    """Config and parameters of a Hugging Face folder (Llama, Qwen2, Qwen3), born sharded.

    Args:
        folder: holds config.json and model.safetensors, whole or split with an index.
        mesh: where the parameters go.
        rules: from logical axes to mesh axes.
        overrides: fields of `ModelConfig` that replace the folder's, such as compute_dtype,
            score_heads or lora_rank.
        key: draws what no published checkpoint holds: scalar heads and adapters.

    Raises:
        ValueError: unknown model_type, unsupported config, missing or misshapen tensors.
    """
    folder = pathlib.Path(folder)
    config, family = _read_family(folder, overrides)
    model = decoder(config, rules)
    shapes_tree = jax.eval_shape(model.init, jax.random.key(0))
    shardings_tree = shardings_for(model.axes(), shapes_tree, mesh, rules)
    shapes = traverse_util.flatten_dict(shapes_tree, sep="/")
    shardings = traverse_util.flatten_dict(shardings_tree, sep="/")
    fresh = [path for path in shapes if any(mark in path for mark in FRESH)]
    unnamed = sorted(set(shapes) - set(fresh) - set(family.names))
    if unnamed:
        raise ValueError(f"the checkpoint's family has no names for {', '.join(unnamed)}")

    tensors = open_folder(folder)
    names = {
        path: _published(family.names[path], config.layers) for path in shapes if path not in fresh
    }
    known = [name for each in family.names.values() for name in _published(each, config.layers)]
    _check_names(tensors, [name for each in names.values() for name in each], known)
    leaves = {
        path: _load_leaf(tensors, names[path], path, shapes[path], shardings[path])
        for path in names
    }
    leaves |= _fresh_leaves(model, fresh, key, shardings)
    return config, traverse_util.unflatten_dict(leaves, sep="/")
