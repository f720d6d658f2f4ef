"""A Hugging Face folder -> our config and sharded parameters, tensor by tensor.

Files are mapped, not read, and every device takes only its own part of a tensor (see `place`), so
the host never holds more than a tensor or two beside what is loaded.
"""

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Key

from rlhf_jax.mesh import ShardingRules, shardings_for
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import family_of
from rlhf_jax.models.family import Family, Json, Published
from rlhf_jax.models.heads import has_bias
from rlhf_jax.models.place import place_leaf
from rlhf_jax.models.tensors import (
    VALUE_HEAD,
    layout,
    of_layer,
    open_folder,
    open_tensors,
    take,
    with_prefix,
)
from rlhf_jax.models.transformer import decoder
from rlhf_jax.types import Params

# Leaves that no published checkpoint holds and that are drawn.
ADAPTERS = "lora_"
_SCORERS = {"ForSequenceClassification": "outcome", "ForTokenClassification": "process"}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a folder's JSON file.

    Raises:
        ValueError: there is none, or something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; wanted a Hugging Face model folder")
    return read_object(path)


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object in any JSON file that is there.

    Raises:
        ValueError: naming the file, if it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); was it cut short?") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__} where an object is wanted")
    return found


def score_heads(published: Json) -> tuple[str, ...]:
    """The heads of a published model: () for one that predicts tokens."""
    names = published.get("architectures") or [""]
    for ending, head in _SCORERS.items():
        if names[0].endswith(ending):
            labels = len(published.get("id2label") or {"0": ""})
            if labels != 1:
                raise ValueError(f"config.json: {names[0]} has {labels} labels; wanted 1, a score")
            return (head,)
    return ()


def _stored_heads(folder: pathlib.Path) -> tuple[str, ...]:
    """The heads that a folder holds; a value head lies beside a bare decoder (`save_hf`)."""
    found = score_heads(read_json(folder / "config.json"))
    return (*found, "value") if (folder / VALUE_HEAD).is_file() else found


def _read_family(folder: pathlib.Path, overrides: Mapping[str, Any]) -> tuple[ModelConfig, Family]:
    published = read_json(folder / "config.json")
    if published.get("quantization_config"):
        raise ValueError(
            f"{folder}/config.json: quantization_config "
            f"{published['quantization_config'].get('quant_method')!r}; wanted plain weights"
        )
    family = family_of(published)
    heads = _stored_heads(folder)
    fields = family.fields(published) | {"score_heads": heads, "lm_head": not heads}
    return ModelConfig(**{**fields, **overrides}), family


def read_hf_config(
    folder: str | pathlib.Path, overrides: Mapping[str, Any] = MappingProxyType({})
) -> ModelConfig:
    """The config of a Hugging Face folder.

    Args:
        overrides: fields of `ModelConfig` that replace what the folder says.
    """
    return _read_family(pathlib.Path(folder), overrides)[0]


def all_names(family: Family, config: ModelConfig) -> dict[str, Published]:
    """Where each leaf lies, those of scoring heads included."""
    names = dict(family.names)
    for head in config.score_heads:
        names |= head_names(family, head)
    return names


def head_names(family: Family, head: str) -> dict[str, Published]:
    """Where the leaves of one scoring head lie."""
    theirs = "value" if head == "value" else family.classifier.get(head, "score")
    names = {f"heads/{head}/kernel": Published(f"{theirs}.weight")}
    if has_bias(head):
        names[f"heads/{head}/bias"] = Published(f"{theirs}.bias")
    return names


def _layers_of(published: Published, layers: int) -> list[Published]:
    """The tensors of one leaf: one, or one per layer where layers are stacked."""
    if "{layer}" not in published.name:
        return [published]
    return [of_layer(published, layer) for layer in range(layers)]


def _check_names(
    there: Iterable[str], wanted: Iterable[str], known: Iterable[str], ignored: tuple[str, ...]
) -> None:
    there, wanted = set(there), set(wanted)
    # A weight left behind means another architecture than the config says.
    unused = sorted(n for n in there - set(known) if not n.endswith(ignored))
    missing = sorted(wanted - there)
    if missing:
        near = difflib.get_close_matches(missing[0], unused or sorted(there), n=3, cutoff=0.3)
        raise ValueError(
            f"the files lack {len(missing)} tensors: {', '.join(missing[:8])}; "
            f"nearest to the first are {', '.join(near) or 'none'}"
        )
    if unused:
        near = difflib.get_close_matches(unused[0], sorted(known), n=3, cutoff=0.3)
        raise ValueError(
            f"no place for {len(unused)} tensors: {', '.join(unused[:8])}; "
            f"nearest to the first are {', '.join(near) or 'none'}"
        )


class _Found(NamedTuple):
    """One leaf in the files: one view, or one per layer, and what turns a view into ours."""

    views: list[np.ndarray]
    axes: tuple[int, ...]


def _find_leaves(
    folder: pathlib.Path, config: ModelConfig, family: Family, shapes: Mapping[str, Any]
) -> dict[str, _Found]:
    """Every leaf that the folder holds; all names and shapes are checked."""
    tensors = with_prefix(open_folder(folder, family.ignored), family.prefix)
    stored = _stored_heads(folder)
    if "value" in stored:
        tensors |= open_tensors(folder / VALUE_HEAD)
    table = all_names(family, config)
    drawn = set(config.score_heads) - set(stored)
    fresh = tuple(f"heads/{head}/" for head in drawn)
    ours = [p for p in shapes if ADAPTERS not in p and not p.startswith(fresh)]
    unnamed = sorted(set(ours) - set(table))
    if unnamed:
        raise ValueError(f"the checkpoint's family has no names for {', '.join(unnamed)}")
    names = {p: _layers_of(table[p], config.layers) for p in ours}
    # Heads that this model does not have are no mistake in the file; any other tensor is.
    theirs = all_names(family, dataclasses.replace(config, score_heads=stored))
    left = [at for p, at in theirs.items() if p.startswith(("unembed/", "heads/"))]
    known = [n.name for at in (*map(table.get, ours), *left) for n in _layers_of(at, config.layers)]
    wanted = [n.name for each in names.values() for n in each]
    _check_names(tensors, wanted, known, family.ignored)
    found = {}
    for path, each in names.items():
        laid = layout(path, shapes[path].shape[path.startswith("layers/") :], each[0])
        views = [take(tensors[one.name], laid, one) for one in each]
        found[path] = _Found(views, laid.axes)
    return found


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
    """Config and parameters of a Hugging Face folder of a known family, born sharded.

    Args:
        folder: holds config.json and model.safetensors, whole or split with an index.
        mesh: where the parameters go.
        rules: from logical axes to mesh axes.
        overrides: fields of `ModelConfig` that replace the folder's, such as compute_dtype,
            score_heads or lora_rank.
        key: draws what the folder does not hold: scalar heads and adapters.

    Raises:
        ValueError: unknown model_type, unsupported config, missing or misshapen tensors; before
            any device holds anything.
    """
    folder = pathlib.Path(folder)
    config, family = _read_family(folder, overrides)
    model = decoder(config, rules)
    shapes_tree = model.shapes()
    shardings_tree = shardings_for(model.axes(), shapes_tree, mesh, rules)
    shapes = traverse_util.flatten_dict(shapes_tree, sep="/")
    shardings = traverse_util.flatten_dict(shardings_tree, sep="/")
    found = _find_leaves(folder, config, family, shapes)
    leaves = {p: place_leaf(*each, shapes[p], shardings[p]) for p, each in found.items()}
    leaves |= _fresh_leaves(model, [p for p in shapes if p not in found], key, shardings)
    return config, traverse_util.unflatten_dict(leaves, sep="/")


def check_hf(folder: str | pathlib.Path) -> None:
    """Raises the ValueError of `load_hf` for a folder that it would not load; touches no device."""
    folder = pathlib.Path(folder)
    config, family = _read_family(folder, {})
    shapes_tree = decoder(config).shapes()
    _find_leaves(folder, config, family, traverse_util.flatten_dict(shapes_tree, sep="/"))
