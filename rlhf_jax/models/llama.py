"""Llama as published: its config.json keys and the names of its tensors. Data, no mathematics.

Touvron et al. 2023, https://arxiv.org/abs/2302.13971; names of transformers' LlamaForCausalLM.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Json = Mapping[str, Any]


class Family(NamedTuple):
    """How one published family maps to our decoder.

    fields(config_json) -> keyword arguments of `ModelConfig`
    names: path of our parameter -> name of the published tensor, ``{layer}`` for its number
    """

    fields: Callable[[Json], dict[str, Any]]
    names: Mapping[str, str]


NAMES: Mapping[str, str] = MappingProxyType(
    {
        "embed/table": "model.embed_tokens.weight",
        "layers/attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
        "layers/attention/query/kernel": "model.layers.{layer}.self_attn.q_proj.weight",
        "layers/attention/key/kernel": "model.layers.{layer}.self_attn.k_proj.weight",
        "layers/attention/value/kernel": "model.layers.{layer}.self_attn.v_proj.weight",
        "layers/attention/output/kernel": "model.layers.{layer}.self_attn.o_proj.weight",
        "layers/mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
        "layers/mlp/gate/kernel": "model.layers.{layer}.mlp.gate_proj.weight",
        "layers/mlp/up/kernel": "model.layers.{layer}.mlp.up_proj.weight",
        "layers/mlp/down/kernel": "model.layers.{layer}.mlp.down_proj.weight",
        "final_norm/scale": "model.norm.weight",
        "unembed/kernel": "lm_head.weight",
    }
)


def refuse(config: Json, allowed: Mapping[str, Any]) -> None:
    """Raises ValueError for a key whose value is neither absent, null nor the allowed one."""
    for key, wanted in allowed.items():
        got = config.get(key)
        if got is not None and got != wanted:
            raise ValueError(f"config.json: {key}={got!r} is not supported; wanted {wanted!r}")


def rope_theta(config: Json) -> float:
    """Base of the rotary frequencies: `rope_theta`, or inside `rope_parameters` (transformers 5).

    Raises:
        ValueError: the positions are scaled (linear, dynamic, yarn, llama3, ...).
    """
    theta = config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        by_layer = any(isinstance(value, Mapping) for value in rope.values())
        if kind != "default" or by_layer or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"config.json: {key}={dict(rope)} scales positions; only plain rotary "
                "positions (rope_type 'default') are supported so far"
            )
        theta = rope.get("rope_theta", theta)
    return 10000.0 if theta is None else float(theta)


def decoder_fields(config: Json) -> dict[str, Any]:
    """What all families of this kind share; defaults are those of transformers."""
    missing = [
        key
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        )
        if config.get(key) is None
    ]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    refuse(config, {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False})
    layer_types = set(config.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ValueError(f"config.json: layer_types={sorted(layer_types)}; only full_attention")
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
        "rope_theta": rope_theta(config),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def llama() -> Family:
    """Llama 1 to 3 without rope scaling, and everything saved as model_type "llama"."""

    def fields(config):
        refuse(config, {"attention_bias": False})
        return decoder_fields(config)

    return Family(fields=fields, names=NAMES)
