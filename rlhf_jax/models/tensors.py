"""The tensors of a Hugging Face folder as views of its mapped files, and how they lie there.

The safetensors format is 8 bytes of header length, a JSON header and raw little-endian tensors
(https://github.com/huggingface/safetensors). Its library checks a file; the views are made here,
so that no byte is copied before a device asks for it.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from rlhf_jax.models.family import Published

DTYPES = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    }
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"  # ours: beside a bare decoder
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_tensors(path: pathlib.Path, ignored: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Every tensor of one .safetensors file as a view of the mapped file.

    Args:
        ignored: endings of tensors to leave out.

    Raises:
        ValueError: no safetensors file, cut short, or with tensors that are not floats.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or cut short: {error}") from error
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if name.endswith(ignored):
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name} is {entry['dtype']}; wanted one of {', '.join(DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        raw = data[start + begin : start + end]
        tensors[name] = raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def open_folder(folder: pathlib.Path, ignored: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Tensors of model.safetensors, or of all the files that its index names.

    Raises:
        ValueError: files are missing, damaged, or hold pickled objects instead.
    """
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        names = _files_of(folder / INDEX)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        there = sorted(path.name for path in folder.iterdir())
        pickled = [name for name in there if name.endswith(_PICKLED)]
        reason = (
            f"; {', '.join(pickled)} is not read, because unpickling runs code that the file "
            "brings: load and save it once with transformers (safe_serialization=True)"
            if pickled
            else f"; it holds {there}"
        )
        raise ValueError(f"{folder} lacks {', '.join(absent)}{reason}")
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors.update(open_tensors(folder / name, ignored))
    return tensors


def _files_of(index: pathlib.Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{index} has no weight_map ({error!r}); was it cut short?") from error


class Layout(NamedTuple):
    """How one of our leaves lies in its published tensor.

    shape: of the whole tensor.
    view: of the part that is ours, with heads as an axis of their own.
    axes: ``view.transpose(axes)`` is our leaf.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    axes: tuple[int, ...]


def layout(path: str, shape: tuple[int, ...], published: Published) -> Layout:
    """Where the leaf at `path` of `shape` lies.

    Published kernels are [outputs, inputs]; ours keep inputs first and heads as an axis of their
    own: query [D H Dh], output [H Dh D], gate [D F].
    """
    parts, axes = published.parts, tuple(range(len(shape)))
    if path.startswith("heads/"):  # one label
        return Layout((1, *shape), shape, axes)
    if path.endswith("/table"):
        return Layout(shape, shape, axes)
    if not path.endswith("/kernel"):  # vectors: scales, biases
        return Layout((parts * math.prod(shape),), shape, axes)
    inputs = len(shape) - 1 if path.endswith("output/kernel") else 1
    ins, outs = shape[:inputs], shape[inputs:]
    if not published.outputs_first:
        return Layout((math.prod(ins), parts * math.prod(outs)), shape, axes)
    turned = (*range(len(outs), len(shape)), *range(len(outs)))
    return Layout((parts * math.prod(outs), math.prod(ins)), outs + ins, turned)


def take(tensor: np.ndarray, laid: Layout, published: Published) -> np.ndarray:
    """The part of a published tensor that is ours, of shape `laid.view`; still a view.

    Raises:
        ValueError: the tensor has another shape than the config wants.
    """
    if tensor.shape != laid.shape:
        raise ValueError(
            f"{published.name} is {tensor.shape} in the file; the config wants {laid.shape}"
        )
    axis = 0 if published.outputs_first else tensor.ndim - 1
    size = tensor.shape[axis] // published.parts
    part = slice(published.part * size, (published.part + 1) * size)
    ours = tensor[part] if axis == 0 else tensor[..., part]
    return ours.reshape(laid.view)


def of_layer(published: Published, layer: int) -> Published:
    """The tensor of one layer."""
    return published._replace(name=published.name.format(layer=layer))


def with_prefix(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Tensors of a bare decoder under the names that it has inside a class with a head."""
    if any(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
