"""Adapters in the format of PEFT (https://github.com/huggingface/peft), both ways.

A folder holds adapter_config.json and adapter_model.safetensors: for a projection y = W x of the
published model, A [R, inputs] and B [outputs, R], used as W + (α/R) B A, as ours are. Where the
published model has several of our projections in one tensor (GPT-2's c_attn, GLM's gate_up_proj),
one pair (A, B) serves all of them: written, the pairs stand beside one another, B in blocks, with R
and α multiplied by their number (rank_pattern, alpha_pattern), which is exact; read, each gets its
own rows of B.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from rlhf_jax.mesh import ShardingRules, fetch_host, shardings_for
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import family_of, publish
from rlhf_jax.models.family import Family, Json, Published
from rlhf_jax.models.load import head_names, load_hf, read_hf_config, read_json
from rlhf_jax.models.lora import merge_lora
from rlhf_jax.models.save import (
    cast,
    check_empty,
    drafted,
    json_bytes,
    write_files,
    write_safetensors,
)
from rlhf_jax.models.tensors import layout, open_tensors
from rlhf_jax.models.transformer import decoder
from rlhf_jax.text.hub import local_folder
from rlhf_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = MappingProxyType({"policy": "CAUSAL_LM", "outcome": "SEQ_CLS", "process": "TOKEN_CLS"})
_PREFIX = "base_model.model."
_LAYER = "{layer}."
# What changes the formula above, or the base's weights, and the values that do not.
_ALLOWED = MappingProxyType(
    {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
        **dict.fromkeys(
            (
                "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication",
                "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
                "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
            ),
            (False,),
        ),
    }
)  # fmt: skip


class Adapters(NamedTuple):
    """A folder of adapters that was looked at; no parameters are on a device yet.

    base: the Hugging Face folder of the model that they change.
    config: of the two together, without adapters.
    leaves: ours, in numpy, of one rank and with a scale of 1; heads included.
    """

    base: pathlib.Path
    config: ModelConfig
    leaves: Mapping[str, np.ndarray]


def save_peft(
    folder: str | pathlib.Path,
    params: Params,
    config: ModelConfig,
    role: str,
    *,
    base: str,
    published: Json | None = None,
    dtype: str = "",
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes the adapters of a model, and its head, where PEFT loads them.

    Every process calls this; process 0 writes.

    Args:
        params: with adapters; stacked layers.
        role: "policy", "outcome" or "process".
        base: what adapter_config.json names as the model that the adapters change.
        published: that model's config.json; empty for the family that can be exactly this one.
        dtype: of the tensors; empty is float32, in which adapters train.
        files: other small files of the folder by name.

    Raises:
        ValueError: no adapters, a role that PEFT has no task for, or something is in the folder.
        OSError: naming the file.
    """
    folder = pathlib.Path(folder)
    check_empty(folder)
    if role not in TASKS:
        raise ValueError(
            f"PEFT has no task for a {role} model; it has those for {', '.join(TASKS)}"
        )
    family = publish(config)[0] if published is None else family_of(published)
    if role not in family.classes:
        raise ValueError(
            f"transformers has no class of this family for a {role} model; it has those for "
            f"{', '.join(family.classes)}"
        )
    leaves = traverse_util.flatten_dict(params, sep="/")
    adapted = {path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")}
    if not adapted:
        raise ValueError("the parameters have no adapters (lora_rank=0); save them with save_hf")
    modules = _modules(family, adapted)
    heads = _names_of_head(family, role)
    tensors = _published_pairs(modules, leaves, config.layers)
    for path, theirs in heads.items():
        shape = layout(path, leaves[path].shape, theirs).shape
        tensors[f"{_PREFIX}{theirs.name}"] = fetch_host(leaves[path]).reshape(shape)
    tensors = {n: cast(n, array, dtype or "float32") for n, array in tensors.items()}
    settings = _settings(family, config, modules, base, TASKS[role], heads.values())
    with drafted(folder) as draft:
        write_safetensors(draft / WEIGHTS, tensors)
        write_files(draft, {**files, CONFIG: json_bytes(settings)})


def _modules(family: Family, ours: set[str]) -> dict[str, list[tuple[str, Published]]]:
    """Their module, ``{layer}`` for the layer's number -> the projections of ours in it."""
    modules: dict[str, list[tuple[str, Published]]] = {}
    for path, published in family.names.items():
        owner = path.removesuffix("/kernel")
        if owner != path and owner in ours:
            modules.setdefault(published.name.removesuffix(".weight"), []).append(
                (owner, published)
            )
    return {name: sorted(some, key=lambda each: each[1].part) for name, some in modules.items()}


def _names_of_head(family: Family, role: str) -> dict[str, Published]:
    """Where the leaves of a role's head lie; {} for a policy."""
    return {} if role == "policy" else head_names(family, role)


def _published_pairs(
    modules: Mapping[str, list[tuple[str, Published]]], leaves: Mapping[str, Any], layers: int
) -> dict[str, np.ndarray]:
    """lora_A and lora_B of every module of every layer, under PEFT's names."""
    tensors = {}
    for module, ours in modules.items():
        pairs = [
            tuple(fetch_host(leaves[f"{o}/{n}"]) for n in ("lora_a", "lora_b")) for o, _ in ours
        ]
        for layer in range(layers):
            name = f"{_PREFIX}{module.format(layer=layer)}"
            low, up = _beside([(a[layer], b[layer]) for a, b in pairs], [p for _, p in ours])
            tensors |= {f"{name}.lora_A.weight": low, f"{name}.lora_B.weight": up}
    return tensors


def _beside(
    pairs: list[tuple[np.ndarray, np.ndarray]], places: list[Published]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one published tensor from those of its parts: A's rows, and B in blocks."""
    lows = [a.reshape(-1, a.shape[-1]).T for a, _ in pairs]
    ups = [b.reshape(b.shape[0], -1).T for _, b in pairs]
    rows, rank = ups[0].shape
    wide = np.zeros((places[0].parts * rows, rank * len(pairs)), ups[0].dtype)
    for number, (up, place) in enumerate(zip(ups, places, strict=True)):
        begin = place.part * rows
        wide[begin : begin + rows, number * rank : (number + 1) * rank] = up
    return np.concatenate(lows), wide


def _target(family: Family, module: str) -> str:
    """The name by which PEFT finds a module: its last word, or two where one is not enough."""
    words = [n.name.removesuffix(".weight") for p, n in family.names.items() if "/kernel" in p]
    below = module.partition(_LAYER)[2]
    last = below.rpartition(".")[2]
    same = {word for word in words if word.rpartition(".")[2] == last}
    return last if len(same) == 1 else below


def _settings(family, config, modules, base, task, heads) -> dict[str, Any]:
    """adapter_config.json."""
    several = {_target(family, m): len(ours) for m, ours in modules.items() if len(ours) > 1}
    turned = any(not place.outputs_first for ours in modules.values() for _, place in ours)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": {name: count * config.lora_rank for name, count in several.items()},
        "alpha_pattern": {name: count * config.lora_alpha for name, count in several.items()},
        "target_modules": sorted(_target(family, module) for module in modules),
        "modules_to_save": sorted({h.name.partition(".")[0] for h in heads}) or None,
        "fan_in_fan_out": turned,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def is_adapter_folder(folder: str | pathlib.Path) -> bool:
    """Whether `folder` holds adapters in PEFT's format."""
    return (pathlib.Path(folder) / CONFIG).is_file()


def base_folder(folder: str | pathlib.Path) -> pathlib.Path:
    """The Hugging Face folder that adapters belong to, as they name it: by its path, from here or
    from the adapters, or by its name on the hub.

    Raises:
        ValueError: it is not there.
    """
    path = pathlib.Path(folder) / CONFIG
    named = read_json(path).get("base_model_name_or_path") or ""
    for found in (path.parent / named, pathlib.Path(local_folder(named))):
        if named and (found / "config.json").is_file():
            return found
    raise ValueError(
        f"{path}: base_model_name_or_path={named!r} is no Hugging Face folder here; set it to the "
        "folder of the model that the adapters were trained on"
    )


def open_peft(folder: str | pathlib.Path) -> Adapters:
    """Looks at a folder of adapters and their base; reads the adapters, touches no device.

    Raises:
        ValueError: settings that are not plain LoRA, no base, or tensors that do not fit it.
    """
    folder = pathlib.Path(folder)
    settings, base = read_json(folder / CONFIG), base_folder(folder)
    _check_settings(folder / CONFIG, settings)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} lacks {WEIGHTS}; pickled adapters are not read")
    tensors = open_tensors(path)
    config, family = read_hf_config(base), family_of(read_json(base / "config.json"))
    task = settings.get("task_type")
    role = next((role for role, name in TASKS.items() if name == task), "policy")
    if role != "policy":
        config = dataclasses.replace(config, lm_head=False, score_heads=(role,))
    leaves, used = _read_projections(path, tensors, settings, config, family)
    for ours, theirs in _names_of_head(family, role).items():
        name = f"{_PREFIX}{theirs.name}"
        if name in tensors:
            shape = (config.width,) if ours.endswith("kernel") else ()
            leaves[ours] = tensors[name].astype(np.float32).reshape(shape)
            used.add(name)
        elif role not in read_hf_config(base).score_heads:
            raise ValueError(f"{path} lacks {name}, and so does the base {base}")
    unused = sorted(set(tensors) - used)
    if unused:
        raise ValueError(
            f"{path}: no place for {len(unused)} tensors: {', '.join(unused[:4])}; wanted adapters "
            "of the projections of the layers, and the head"
        )
    return Adapters(base, config, leaves)


def _read_projections(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    config: ModelConfig,
    family: Family,
) -> tuple[dict[str, np.ndarray], set[str]]:
    """The leaves of all adapters, and the names of the tensors that they are made of."""
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight")]
    if not ranks:
        raise ValueError(f"{path} holds no lora_A; wanted adapters")
    shapes = _flat_shapes(dataclasses.replace(config, lora_rank=max(ranks)))
    every = {name.removesuffix("/kernel") for name in family.names if name.startswith("layers/")}
    leaves, used = {}, set()
    for module, ours in _modules(family, every).items():
        for layer in range(config.layers):
            there = module.format(layer=layer)
            pair = [f"{_PREFIX}{there}.{letter}.weight" for letter in ("lora_A", "lora_B")]
            held = [name for name in pair if name in tensors]
            if not held:
                continue
            if len(held) == 1:
                raise ValueError(f"{path} has {held[0]} but not its other half")
            scale = _scale(settings, there, len(tensors[pair[0]]))
            low, up = (np.asarray(tensors[name], np.float32) for name in pair)
            _put(leaves, shapes, ours, layer, low, up * scale, f"{path}: {there}")
            used |= set(pair)
    return leaves, used


def load_peft(
    folder: str | pathlib.Path, mesh: jax.sharding.Mesh, rules: ShardingRules
) -> tuple[ModelConfig, Params]:
    """Config and plain parameters of adapters and their base: W + scale B A, born sharded.

    Raises:
        ValueError: as `open_peft` and `load_hf`.
    """
    base, config, leaves = open_peft(folder)
    fields = {"lm_head": config.lm_head, "score_heads": config.score_heads}
    _, params = load_hf(base, mesh, rules, overrides=fields, key=jax.random.key(0))
    # Ranks and scales are in the leaves.
    rank = max(leaf.shape[1] for path, leaf in leaves.items() if path.endswith("/lora_b"))
    whole = dataclasses.replace(config, lora_rank=rank, lora_alpha=rank)
    model = decoder(whole, rules)
    shapes = model.shapes()
    shardings = shardings_for(model.axes(), shapes, mesh, rules)
    flat = traverse_util.flatten_dict(shardings, sep="/")
    tree = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in leaves.items():
        tree[path] = jax.make_array_from_callback(leaf.shape, flat[path], leaf.__getitem__)
    return config, merge_lora(traverse_util.unflatten_dict(tree, sep="/"), whole)


def _flat_shapes(config: ModelConfig) -> dict[str, Any]:
    shapes = decoder(config).shapes()
    return traverse_util.flatten_dict(shapes, sep="/")


def _check_settings(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    for key, allowed in _ALLOWED.items():
        found = settings.get(key)
        if found and found not in allowed:
            wanted = ", ".join(repr(one) for one in allowed)
            raise ValueError(
                f"{path}: {key}={found!r} is not supported; wanted {wanted}, or merge the adapters "
                "into their base with PEFT (merge_and_unload) and start from that"
            )


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """α/R of one module, α/√R where the settings say so."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _put(
    leaves: dict[str, np.ndarray],
    shapes: Mapping[str, Any],
    ours: list[tuple[str, Published]],
    layer: int,
    low: np.ndarray,
    up: np.ndarray,
    where: str,
) -> None:
    """Writes A and scaled B of one published module into the leaves of its parts.

    Ranks below the largest are filled up with zeros.
    """
    for owner, place in ours:
        wanted = [shapes[f"{owner}/{leaf}"].shape for leaf in ("lora_a", "lora_b")]
        inputs, outputs = math.prod(wanted[0][1:-1]), math.prod(wanted[1][2:])
        fits = (len(low), inputs), (place.parts * outputs, len(low))
        if (low.shape, up.shape) != fits:
            raise ValueError(
                f"{where}: lora_A is {low.shape} and lora_B {up.shape}; the base wants "
                f"{fits[0]} and {fits[1]}"
            )
        a, b = (
            leaves.setdefault(f"{owner}/{leaf}", np.zeros(shape, np.float32))
            for leaf, shape in zip(("lora_a", "lora_b"), wanted, strict=True)
        )
        rows = up[place.part * outputs : (place.part + 1) * outputs]
        a[layer, ..., : len(low)] = low.T.reshape(*wanted[0][1:-1], -1)
        b[layer, : len(low)] = rows.T.reshape(-1, *wanted[1][2:])
