"""Where the parameters of each role come from: fresh, a Hugging Face folder, or another run.

A role is a use of a model: policy, reference, value, or a learned reward. All are trees of one
decoder; they differ in heads, in whether they have an LM head, and in their adapters.
"""

import dataclasses
import pathlib
import typing
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import run_folder
from rlhf_jax.mesh import ShardingRules, shard_init, shardings_for
from rlhf_jax.models.config import ModelConfig, named_size
from rlhf_jax.models.heads import is_odin, judging_head
from rlhf_jax.models.load import check_hf, load_hf, read_hf_config
from rlhf_jax.models.lora import join, merge_lora, partition
from rlhf_jax.models.peft import base_folder, is_adapter_folder, load_peft, open_peft
from rlhf_jax.models.transformer import Model, decoder
from rlhf_jax.schema import check_section, within
from rlhf_jax.text.hub import local_folder
from rlhf_jax.training.checkpoint import check_newest, restore_subtree
from rlhf_jax.types import Params

# What a role may set itself when the rest comes from a checkpoint.
OWN_FIELDS = ("param_dtype", "compute_dtype", "remat", "logprob_chunk", "layer_chunk")
# A model's section: a name or a folder to start from, and fields of its config.
# How many members a model has is said where it becomes a reward model (reward.members).
_MEMBERS = ("members", "ensemble")
_FIELDS = {"name": str, "init_from": str, **typing.get_type_hints(ModelConfig)}
_FIELDS = {name: kind for name, kind in _FIELDS.items() if name not in _MEMBERS}
_SECTION = TypedDict("_SECTION", {name: NotRequired[kind] for name, kind in _FIELDS.items()})
ADAPTERS = ("lora_rank", "lora_alpha", "lora_targets")


def is_hf_folder(folder: str) -> bool:
    """Whether ``folder`` holds a Hugging Face model (a config.json with a model_type)."""
    path = pathlib.Path(folder) / "config.json"
    return path.is_file() and "model_type" in run_folder.read_json(path)


def trained_role(folder: str) -> str:
    """The role that the run in ``folder`` trained and later stages start from."""
    models = run_folder.read_models(folder)
    return "policy" if "policy" in models else next(iter(models))


def describe(
    section: ConfigDict, vocab_size: int, *, path: str = "model", **changes: Any
) -> ModelConfig:
    """The model config of ``section`` (name or init_from, and overrides), then ``changes``.

    ``path`` is where the section stands in the config, for messages.

    Raises:
        ValueError: for an unknown key, or if the tokenizer has more tokens than the model.
    """
    check_section(path, section.to_dict(), _SECTION)
    # Lists cannot be hashed, and a model's config is a part of what is compiled.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in section.to_dict().items()}
    name, init_from = values.pop("name", ""), values.pop("init_from", "")
    if not init_from:
        described = named_size(name, **({"vocab_size": vocab_size} | values | changes))
        _check_vocabulary(f"{path}.name={name!r}", described, vocab_size)
        return described
    init_from = local_folder(init_from, f"{path}.init_from={init_from!r}")
    if not pathlib.Path(init_from).is_dir():
        raise ValueError(f"{path}.init_from={init_from!r} is not a folder")
    with within(f"{path}.init_from"):
        base = described_in(init_from)
    if changes.get("lm_head", values.get("lm_head", True)) and not base.lm_head:
        raise ValueError(
            f"{path}.init_from={init_from!r} has no LM head, so it is no policy: it is a model "
            f"with the heads {', '.join(base.score_heads) or 'none'}; name the folder of a policy"
        )
    _check_vocabulary(f"{path}.init_from={init_from!r}", base, vocab_size)
    unknown = [k for k in values if k not in (*OWN_FIELDS, "score_heads", *ADAPTERS)]
    if unknown:
        raise ValueError(
            f"{path}.{unknown[0]} cannot be set beside {path}.init_from={init_from!r}, which "
            f"decides the shape; what can: {', '.join((*OWN_FIELDS, 'score_heads', *ADAPTERS))}"
        )
    alone = {"lora_rank": 0, "score_heads": (), "members": 1, "ensemble": "none"}
    described = dataclasses.replace(base, **(alone | values | changes))
    _check_members(f"{path}.init_from={init_from!r}", base, described)
    return described


def _check_members(path: str, base: ModelConfig, described: ModelConfig) -> None:
    """Raises a ValueError if a model cannot start from an ensemble, or not from that one."""
    if base.members == 1:
        return
    later = base.ensemble == "linear" and described.ensemble == "lora"
    if described.members != base.members or not (later or described.ensemble == base.ensemble):
        raise ValueError(
            f"{path} is an ensemble ({base.ensemble}, {base.members} members), from which only one "
            "like it can start, or a LoRA ensemble from a linear one of as many members; this is "
            f"{described.ensemble} with members={described.members}"
        )
    if base.ensemble == "lora" and any(
        getattr(base, name) != getattr(described, name) for name in ADAPTERS
    ):
        raise ValueError(
            f"{path} has adapters of its own; set model.lora_rank={base.lora_rank}, "
            f"model.lora_alpha={base.lora_alpha} and model.lora_targets={base.lora_targets}"
        )


def ensemble_of(folder: str) -> dict[str, Any]:
    """Fields of the model config that make an ensemble of what a folder holds; {} of one model.

    With the adapters of a LoRA ensemble, which are never merged: there would be a base for each.
    """
    if not folder or not pathlib.Path(local_folder(folder)).is_dir():
        return {}  # `describe` says what is wrong with it
    config = described_in(folder)
    if config.members == 1:
        return {}
    names = (*_MEMBERS, *ADAPTERS) if config.ensemble == "lora" else _MEMBERS
    return {name: getattr(config, name) for name in names}


def described_in(folder: str) -> ModelConfig:
    """The config of what a Hugging Face folder holds, or of the role that a run trained."""
    folder = local_folder(folder)
    if is_adapter_folder(folder):
        return open_peft(folder).config
    if is_hf_folder(folder):
        return read_hf_config(folder)
    return run_folder.read_models(folder)[trained_role(folder)]


def _check_vocabulary(path: str, model: ModelConfig, vocab_size: int) -> None:
    if model.vocab_size < vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens but {path} has room for {model.vocab_size}; "
            "set data.tokenizer to the model's own"
        )


def check_start(path: str, folder: str) -> None:
    """Looks whether parameters can be read from ``folder``, before a run begins; reads none.

    Args:
        folder: a Hugging Face folder or that of a run; empty starts from random weights.

    Raises:
        ValueError: naming the folder, if its files are absent or cut short.
    """
    if not folder:
        return
    with within(f"{path}.init_from={folder!r}"):
        folder = local_folder(folder)
        if is_adapter_folder(folder):
            open_peft(folder)
            check_hf(base_folder(folder))
        elif is_hf_folder(folder):
            check_hf(folder)
        else:
            check_newest(folder)


def check_heads(path: str, folder: str, wanted: tuple[str, ...]) -> None:
    """Raises a ValueError if a folder (empty: none) lacks a head that ``path`` reads."""
    if not folder:
        return
    heads = described_in(folder).score_heads
    missing = sorted(set(wanted) - set(heads))
    if missing:
        hint = "; ODIN pays by head='quality'" if is_odin(heads) else ""
        raise ValueError(
            f"{path} reads head {missing[0]!r}, but {folder} has {sorted(heads)}{hint}"
        )


def load(folder: str, mesh: Mesh, rules: ShardingRules, *, dtype: str = "") -> Params:
    """The plain parameters (adapters merged) of a Hugging Face or run folder, sharded.

    Those of a LoRA ensemble keep their adapters: `loaded_config` is what they belong to.

    Args:
        dtype: in which a Hugging Face folder is loaded; empty is float32. Runs keep their own.
    """
    folder = local_folder(folder)
    if is_adapter_folder(folder):
        return load_peft(folder, mesh, rules)[1]
    if is_hf_folder(folder):
        overrides = {"param_dtype": dtype} if dtype else {}
        return load_hf(folder, mesh, rules, overrides=overrides)[1]
    role = trained_role(folder)
    params = load_role(folder, role, mesh, rules)
    config = run_folder.read_models(folder)[role]
    return params if config.ensemble == "lora" else merge_lora(params, config)


def loaded_config(folder: str) -> ModelConfig:
    """The config of what `load` gives of a run's folder: without adapters, but for those of a LoRA
    ensemble."""
    config = run_folder.read_models(folder)[trained_role(folder)]
    return config if config.ensemble == "lora" else dataclasses.replace(config, lora_rank=0)


def sharded_shapes(config: ModelConfig, mesh: Mesh, rules: ShardingRules) -> Params:
    """The tree of a model as ShapeDtypeStructs with their shardings: what a restore aims at."""
    model = decoder(config, rules)
    shapes = model.shapes()
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings_for(model.axes(), shapes, mesh, rules),
    )


def load_role(folder: str, role: str, mesh: Mesh, rules: ShardingRules) -> Params:
    """All parameters of a role that a run trained, adapters beside their base, sharded."""
    config = run_folder.read_models(folder)[role]
    target = sharded_shapes(config, mesh, rules)
    if config.lora_rank == 0:
        return restore_subtree(folder, ("train", "params", role), target)
    trained, base = partition(target, config)
    return join(
        restore_subtree(folder, ("train", "params", role), trained),
        restore_subtree(folder, ("reference",), base),
    )


def _without(tree: Mapping, known: Mapping) -> dict:
    """The part of nested dict ``tree`` whose leaves ``known`` does not have."""
    rest = {}
    for name, value in tree.items():
        if name not in known:
            rest[name] = value
        elif isinstance(value, Mapping) and (inner := _without(value, known[name])):
            rest[name] = inner
    return rest


def only(tree: Mapping, wanted: Mapping) -> dict:
    """The leaves of nested dict ``tree`` that ``wanted`` also has."""
    return {
        name: only(value, wanted[name]) if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if name in wanted
    }


def adapters_on(folder: str, policy: ConfigDict) -> ModelConfig | None:
    """The model of the run in ``folder`` if it is adapters on the base that the policy's are on.

    Both started from the same folder, which the run's config.json and the policy's section name.
    """
    start = policy.get("init_from", "")
    if not (folder and start and policy.get("lora_rank", 0)):
        return None
    folder = local_folder(folder)
    if is_hf_folder(folder) or is_adapter_folder(folder):
        return None
    path = pathlib.Path(folder) / "config.json"
    model = run_folder.read_models(folder)[trained_role(folder)]
    if not model.lora_rank or not path.exists():
        return None
    began = run_folder.read_json(path).get("model", {}).get("init_from", "")
    same = began and pathlib.Path(began).resolve() == pathlib.Path(start).resolve()
    return model if same else None


def load_adapters(
    folder: str, path: str, policy_base: Params, mesh: Mesh, rules: ShardingRules
) -> Params:
    """The adapters and heads that a run trained, sharded; ``policy_base`` lies under them.

    Raises:
        ValueError: naming ``path``, if the run trained them on other weights.
    """
    role = trained_role(folder)
    tree = load_role(folder, role, mesh, rules)
    adapters, base = partition(tree, run_folder.read_models(folder)[role])
    if not same_weights(policy_base, base):
        raise ValueError(
            f"{path}.init_from={folder!r} trained adapters on other weights than those that "
            "model.init_from names now; was that folder changed?"
        )
    return adapters


def same_weights(whole: Params, part: Params) -> bool:
    """Whether ``whole`` has every leaf of ``part`` with the same numbers, in the type it has there.

    Comparing needs one leaf at a time on the devices.
    """
    mine = only(whole, part)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b.astype(a.dtype))), mine, part)
    return all(jax.tree.leaves(same))


def fill_adapters(
    model: Model, known: Params, key: jax.Array, mesh: Mesh, rules: ShardingRules
) -> Params:
    """`fill` for what trains of ``model`` alone: adapters and heads."""
    return _fill(model, known, partition(model.axes(), model.config)[0], key, mesh, rules)


def fill(model: Model, known: Params, key: jax.Array, mesh: Mesh, rules: ShardingRules) -> Params:
    """The full tree of ``model``: leaves of ``known`` that it has, the others fresh, all sharded.

    Leaves that ``known`` gives are never computed (XLA drops them), so a large model is not
    initialised twice.
    """
    return _fill(model, known, model.axes(), key, mesh, rules)


def _fill(model, known, axes, key, mesh, rules) -> Params:
    missing = _without(axes, known)
    # A copy even where nothing is cast: donating one tree must not delete the other.
    kept = only(known, axes)
    shapes = only(model.shapes(), kept)
    kept = jax.tree.map(lambda x, shape: jnp.copy(x).astype(shape.dtype), kept, shapes)
    if not missing:
        return kept
    fresh = shard_init(lambda k: only(model.init(k), missing), key, mesh, rules, missing)
    return join(fresh, kept)


def rename_head(params: Params, name: str) -> Params:
    """``params`` with the head that judges texts under ``name``: a value starts as a reward."""
    heads = params.get("heads", {})
    return {**params, "heads": {name: heads[judging_head(tuple(heads))]}} if heads else params
