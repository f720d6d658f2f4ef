"""What it takes to read and write one published family: its config.json and its tensors' names."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from rlhf_jax.models.config import ModelConfig

Json = Mapping[str, Any]

# Their name of an activation -> ours.
ACTIVATIONS = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
    }
)
FULL, SLIDING = "full_attention", "sliding_attention"


class Published(NamedTuple):
    """Where a leaf of ours lies in published files.

    name: of the tensor, ``{layer}`` for the layer's number.
    part, parts: which of several equal parts along the outputs, where projections are fused.
    outputs_first: kernels lie as [outputs, inputs], as torch's Linear keeps them.
    """

    name: str
    part: int = 0
    parts: int = 1
    outputs_first: bool = True


class Family(NamedTuple):
    """How one published family maps to our decoder and back.

    fields(config.json) -> keyword arguments of `ModelConfig`
    publish(ModelConfig) -> config.json, of a model that has these fields
    names: path of our parameter -> where it lies in published files
    classes: "policy", "outcome", "process" -> transformers' class for it
    prefix: that of the decoder's tensors inside these classes; the bare decoder has none
    classifier: name of the head of each class that scores, where it is not "score"
    ignored: endings of tensors that older files hold and no model needs
    """

    fields: Callable[[Json], dict[str, Any]]
    publish: Callable[[ModelConfig], dict[str, Any]]
    names: Mapping[str, Published]
    classes: Mapping[str, str]
    prefix: str = "model."
    classifier: Mapping[str, str] = MappingProxyType({})
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


def classes_of(name: str, **others: str) -> Mapping[str, str]:
    """The usual three classes of a family; `others` replace the usual names."""
    usual = {
        "policy": f"{name}ForCausalLM",
        "outcome": f"{name}ForSequenceClassification",
        "process": f"{name}ForTokenClassification",
    }
    return MappingProxyType(usual | others)


def refuse(config: Json, allowed: Mapping[str, Any]) -> None:
    """Raises ValueError for a key whose value is neither absent, null nor the allowed one."""
    for key, wanted in allowed.items():
        got = config.get(key)
        if got is not None and got != wanted:
            raise ValueError(f"config.json: {key}={got!r} is not supported; wanted {wanted!r}")


def require(config: Json, *keys: str) -> None:
    """Raises ValueError for keys that the config lacks."""
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")


def activation(config: Json, key: str = "hidden_act", default: str = "silu") -> str:
    """Our name of the activation under `key`."""
    name = config.get(key) or default
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"config.json: {key}={name!r} is not supported; wanted one of {known}")
    return ACTIVATIONS[name]


def published_activation(name: str) -> str:
    """Their name of one of our activations."""
    return {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[name]


def rope_fields(rope: Json, theta: float, where: str = "rope_parameters") -> dict[str, Any]:
    """Rotary fields from a rope dictionary (`rope_parameters`, or `rope_scaling` before
    transformers 5).

    Args:
        theta: the base where the dictionary has none.

    Raises:
        ValueError: an unknown kind of scaling, or one that lacks numbers.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = {"rope_theta": float(rope.get("rope_theta", theta))}
    fraction = rope.get("partial_rotary_factor")
    if fraction is not None:
        fields["rope_fraction"] = float(fraction)
    if kind == "default":
        return fields
    keys = {
        "linear": {"factor": "rope_factor"},
        "llama3": {
            "factor": "rope_factor",
            "low_freq_factor": "rope_low",
            "high_freq_factor": "rope_high",
            "original_max_position_embeddings": "rope_original",
        },
    }
    if kind not in keys:
        raise ValueError(
            f"config.json: {where} has rope_type={kind!r}; supported are default, {', '.join(keys)}"
        )
    missing = [key for key in keys[kind] if rope.get(key) is None]
    if missing:
        raise ValueError(f"config.json: {where} of type {kind!r} lacks {', '.join(missing)}")
    return fields | {"rope_scaling": kind} | {ours: rope[key] for key, ours in keys[kind].items()}


def rope_of(config: Json) -> dict[str, Any]:
    """Rotary fields of a config with one kind of layer, old form or new."""
    theta = float(config.get("rope_theta", 10000.0))
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope:
            if any(isinstance(value, Mapping) for value in rope.values()):
                raise ValueError(f"config.json: {key} differs by kind of layer; wanted one for all")
            return rope_fields(rope, theta, key)
    return {"rope_theta": theta}


def published_rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of a model, in the form of transformers 5."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
    if config.rope_fraction != 1:
        rope["partial_rotary_factor"] = config.rope_fraction
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope_low,
            "high_freq_factor": config.rope_high,
            "original_max_position_embeddings": config.rope_original,
        }
    return rope


def windows(layer_types: list[str], window: int | None) -> dict[str, Any]:
    """Fields of the sliding window from the kind of each layer.

    Raises:
        ValueError: another kind of layer, or a window without its size.
    """
    unknown = sorted(set(layer_types) - {FULL, SLIDING})
    if unknown:
        raise ValueError(
            f"config.json: layer_types has {', '.join(unknown)}; supported are {FULL}, {SLIDING}"
        )
    if SLIDING not in layer_types:
        return {}
    if not window:
        raise ValueError(f"config.json: layers of {SLIDING} but sliding_window={window!r}")
    local = tuple(kind == SLIDING for kind in layer_types)
    return {"window": window} | ({} if all(local) else {"local_layers": local})


def published_windows(config: ModelConfig) -> dict[str, Any]:
    """`layer_types` and `sliding_window` of a model."""
    kinds = [SLIDING if local else FULL for local in config.local]
    return {"layer_types": kinds, "sliding_window": config.window or None}


def decoder_fields(config: Json) -> dict[str, Any]:
    """What all families but GPT-2 share; defaults are those of transformers."""
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    require(config, *sizes, "intermediate_size")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads")
    head_dim = config.get("head_dim")
    return {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": config["hidden_size"] // heads if head_dim is None else head_dim,
        "mlp_width": config["intermediate_size"],
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        **rope_of(config),
    }


def decoder_json(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json keys of `decoder_fields`, and the kind of model."""
    return {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": published_activation(config.activation),
        "rope_parameters": published_rope(config),
    }


def square_root(scale: float) -> int | float:
    """The number whose inverse square root is `scale`, whole where it is one."""
    number = scale**-2
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number
