"""Our config and parameters -> a Hugging Face folder, as transformers loads it: `load` inverted.

Tensors are gathered one by one and written file by file, so that a host holds no more than one file
of them. The folder appears when it is whole.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from safetensors.numpy import save_file

from rlhf_jax.mesh import fetch_host
from rlhf_jax.models.config import DTYPES, ModelConfig
from rlhf_jax.models.families import architecture, family_of, publish
from rlhf_jax.models.family import Family, Json, Published
from rlhf_jax.models.load import all_names
from rlhf_jax.models.tensors import INDEX, VALUE_HEAD, WEIGHTS, layout
from rlhf_jax.types import Params

ROLES = ("policy", "outcome", "process", "value")
_PATTERN = WEIGHTS.replace(".", "{suffix}.", 1)
_ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


class Place(NamedTuple):
    """A published tensor and the leaves of ours that it holds, in order of its parts.

    layer: which layer of stacked leaves; None where they are not stacked.
    """

    name: str
    leaves: tuple[tuple[str, Published], ...]
    layer: int | None


def save_hf(
    folder: str | pathlib.Path,
    params: Params,
    config: ModelConfig,
    role: str,
    *,
    base: Json | None = None,
    token_ids: Mapping[str, Any] = MappingProxyType({}),
    dtype: str = "",
    max_shard_size: str | int = "5GB",
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes a model where transformers' own class of its family and role loads it.

    A "policy" becomes ...ForCausalLM, an "outcome" model ...ForSequenceClassification and a
    "process" model ...ForTokenClassification with one label each. A "value" model has no such
    class: it becomes the bare decoder (...Model), with its head beside it in
    value_head.safetensors: ``value.weight`` [1, D] and ``value.bias`` [1]. `load_hf` reads all four
    back, bit for bit where the type is kept.

    Every process calls this; process 0 writes.

    Args:
        folder: is made; may exist if it is empty.
        params: plain ones, with adapters merged, layers stacked. Heads other than the role's and an
            LM head that the role does not want are left out.
        base: the config.json of the model that this one began as, kept as far as it says nothing of
            the role; else one is written for the family that can be exactly this model.
        token_ids: keys of config.json, such as pad_token_id, without which transformers' class for
            outcome models refuses batches.
        dtype: of the tensors; empty keeps `config.param_dtype`.
        max_shard_size: bytes of a file at most, as a number or such as "5GB".
        files: other small files of the folder by name.

    Raises:
        ValueError: no family has such a model or no class for the role, the base is of another
            model, there is something in the folder, or values are too large for float16.
        OSError: naming the file.
    """
    folder = pathlib.Path(folder)
    check_empty(folder)
    dtype = dtype or config.param_dtype
    family, published = published_config(config, role, base=base, token_ids=token_ids, dtype=dtype)
    leaves = traverse_util.flatten_dict(params, sep="/")
    places = _places(family, config, role, leaves)
    groups = {WEIGHTS: places}
    if role == "value":
        bare = [p._replace(name=p.name.removeprefix(family.prefix)) for p in places]
        groups = {
            WEIGHTS: [p for p in bare if not p.name.startswith("value.")],
            VALUE_HEAD: [p for p in bare if p.name.startswith("value.")],
        }
    texts = dict(files) | {"config.json": json_bytes(published)}
    with drafted(folder) as draft:
        for file, some in groups.items():
            texts |= _write_tensors(draft, file, some, leaves, dtype, max_shard_size)
        write_files(draft, texts)


def published_config(
    config: ModelConfig,
    role: str,
    *,
    base: Json | None = None,
    token_ids: Mapping[str, Any] = MappingProxyType({}),
    dtype: str = "float32",
) -> tuple[Family, dict[str, Any]]:
    """The family of a model and its config.json; see `save_hf`."""
    if role not in ROLES:
        raise ValueError(f"role {role!r}; known: {', '.join(ROLES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if base is None:
        family, published = publish(config)
    else:
        family, published = family_of(base), dict(base)
        _check_same_model(family, base, config)
    for key in ("torch_dtype", "quantization_config", "auto_map", "num_labels"):
        published.pop(key, None)
    published |= {"architectures": [class_of(family, published["model_type"], role)]}
    published |= {"dtype": dtype, **token_ids}
    if role in ("outcome", "process"):
        published |= _ONE_LABEL
    if role == "outcome" and published.get("pad_token_id") is None:
        raise ValueError(
            "an outcome model needs a pad_token_id: transformers finds the last token of a text by "
            "it"
        )
    return family, published


def class_of(family: Family, model_type: str, role: str) -> str:
    """The name of transformers' class for a role.

    Raises:
        ValueError: the family has none.
    """
    if role == "value":
        return f"{family.classes['outcome'].removesuffix('ForSequenceClassification')}Model"
    if role not in family.classes:
        raise ValueError(
            f"transformers has no class for a model of type {model_type!r} that is a {role} model; "
            f"it has those for {', '.join(family.classes)}"
        )
    return family.classes[role]


def _check_same_model(family: Family, base: Json, config: ModelConfig) -> None:
    found, wanted = architecture(ModelConfig(**family.fields(base))), architecture(config)
    differing = [f"{k} {found[k]!r}, not {wanted[k]!r}" for k in wanted if found[k] != wanted[k]]
    if differing:
        raise ValueError(f"the base's config.json is of another model: {'; '.join(differing)}")


def _places(
    family: Family, config: ModelConfig, role: str, leaves: Mapping[str, Any]
) -> list[Place]:
    """Every tensor to write, layer by layer, with the head last."""
    if any("lora_" in path for path in leaves):
        raise ValueError("the parameters have adapters; merge them first (models.lora.merge_lora)")
    heads = () if role == "policy" else (role,)
    if role == "policy" and not config.lm_head:
        raise ValueError("a policy needs an LM head, and this model has none (lm_head=False)")
    if set(heads) - set(config.score_heads):
        there = ", ".join(config.score_heads) or "none"
        raise ValueError(f"the model has no head {role!r}; its heads: {there}")
    table = all_names(family, dataclasses.replace(config, score_heads=heads))
    wanted = [path for path in leaves if not path.startswith("heads/") or path in table]
    if role != "policy":
        wanted = [path for path in wanted if path != "unembed/kernel"]
    unnamed = sorted(set(wanted) - set(table))
    if unnamed:
        raise ValueError(f"the family has no names for {', '.join(unnamed)}")
    fused: dict[str, list[tuple[str, Published]]] = {}
    for path in sorted(wanted, key=list(table).index):
        fused.setdefault(table[path].name, []).append((path, table[path]))
    groups = {
        name: tuple(sorted(some, key=lambda leaf: leaf[1].part)) for name, some in fused.items()
    }
    single = [Place(name, some, None) for name, some in groups.items() if "{layer}" not in name]
    stacked = [
        Place(name.format(layer=layer), some, layer)
        for layer in range(config.layers)
        for name, some in groups.items()
        if "{layer}" in name
    ]
    first = [place for place in single if place.leaves[0][0].endswith("/table")]
    return first + stacked + [place for place in single if place not in first]


def _shape(place: Place, leaves: Mapping[str, Any]) -> tuple[int, ...]:
    path, published = place.leaves[0]
    return layout(path, leaves[path].shape[place.layer is not None :], published).shape


def _gather(place: Place, leaves: Mapping[str, Any], dtype: str) -> np.ndarray:
    """One published tensor, whole, on every process."""
    parts = []
    for path, published in place.leaves:
        leaf = leaves[path] if place.layer is None else leaves[path][place.layer]
        laid = layout(path, leaf.shape, published)
        array = fetch_host(leaf).transpose(np.argsort(laid.axes))
        rows, *others = laid.shape
        if published.outputs_first:
            parts.append(array.reshape(rows // published.parts, *others))
        else:
            parts.append(array.reshape(rows, others[0] // published.parts))
    axis = 0 if place.leaves[0][1].outputs_first else -1
    return cast(place.name, np.concatenate(parts, axis), dtype)


def cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` in another type, contiguous.

    Raises:
        ValueError: naming the tensor, if its values are too large for the type.
    """
    with np.errstate(over="ignore"):
        changed = np.ascontiguousarray(array.astype(jnp.dtype(dtype)))
    if dtype == "float16" and not np.isfinite(changed).all() and np.isfinite(array).all():
        raise ValueError(
            f"{name} holds values up to {np.abs(array.astype(np.float32)).max():.3g}, too large "
            "for float16; keep the type or take bfloat16"
        )
    return changed


def _write_tensors(
    draft: pathlib.Path,
    file: str,
    places: list[Place],
    leaves: Mapping[str, Any],
    dtype: str,
    max_shard_size: str | int,
) -> dict[str, bytes]:
    """Writes tensors to `file`, or to several with an index, which is returned by its name."""
    size = jnp.dtype(dtype).itemsize
    sizes = {place.name: size * int(np.prod(_shape(place, leaves))) for place in places}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda bytes_: bytes_,
        filename_pattern=_PATTERN if file == WEIGHTS else file.replace(".", "{suffix}.", 1),
        max_shard_size=max_shard_size,
    )
    by_name = {place.name: place for place in places}
    for part, names in split.filename_to_tensors.items():
        held = {}
        for name in names:
            array = _gather(by_name[name], leaves, dtype)
            if jax.process_index() == 0:
                held[name] = array
        write_safetensors(draft / part, held)
    if not split.is_sharded:
        return {}
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return {INDEX: json_bytes(index)}


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file, written by process 0.

    Raises:
        OSError: with the system's error number, naming the file.
    """
    if jax.process_index() != 0:
        return
    try:
        save_file(dict(tensors), path, {"format": "pt"})  # transformers wants to be told
    except safetensors.SafetensorError as error:
        told = re.search(r"os error (\d+)", str(error))
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from error


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A JSON file with sorted keys."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def write_files(folder: pathlib.Path, files: Mapping[str, bytes]) -> None:
    """Writes small files, on process 0."""
    if jax.process_index() == 0:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def check_empty(folder: pathlib.Path) -> None:
    """Raises a ValueError for a folder that cannot be written because something is there."""
    if folder.is_dir():
        there: Iterable[str] = sorted(path.name for path in folder.iterdir())
        if there:
            raise ValueError(f"{folder} is not empty ({', '.join(there)}); name a new folder")
    elif folder.exists():
        raise ValueError(f"{folder} is a file; name a new folder")


@contextlib.contextmanager
def drafted(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `folder` that takes its place in the end, or is removed."""
    draft = folder.with_name(f"{folder.name}.tmp")
    if jax.process_index() != 0:
        yield draft
        return
    shutil.rmtree(draft, ignore_errors=True)  # what a killed process left
    draft.mkdir(parents=True)
    try:
        yield draft
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
