"""Gemma 2 and the text models of Gemma 3 as published.

Both scale embeddings by √width, norms by 1 + scale, have norms after attention and MLP, and layers
with a window between layers without. Gemma 2 (https://arxiv.org/abs/2408.00118) caps attention
scores and logits; Gemma 3 (https://arxiv.org/abs/2503.19786) normalises queries and keys instead
and gives layers with a window a rotary base of their own.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.family import (
    FULL,
    SLIDING,
    Family,
    Json,
    Published,
    activation,
    classes_of,
    decoder_fields,
    decoder_json,
    published_rope,
    published_windows,
    refuse,
    rope_fields,
    square_root,
    windows,
)
from rlhf_jax.models.llama import LAYER
from rlhf_jax.models.qwen import QWEN3_NAMES

NAMES = MappingProxyType(
    {
        **QWEN3_NAMES,
        "layers/attention_post_norm/scale": Published(f"{LAYER}.post_attention_layernorm.weight"),
        "layers/mlp_norm/scale": Published(f"{LAYER}.pre_feedforward_layernorm.weight"),
        "layers/mlp_post_norm/scale": Published(f"{LAYER}.post_feedforward_layernorm.weight"),
    }
)
GEMMA2_NAMES = MappingProxyType({k: v for k, v in NAMES.items() if "/query_norm/" not in k})
_ACT = "hidden_activation"
_TANH = "gelu_pytorch_tanh"
_DEFAULTS = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}


def _fields(config: Json, rope: dict[str, Any], pattern: int) -> dict[str, Any]:
    """What both share; every `pattern`-th layer sees all, where the config does not say which."""
    refuse(config, {"use_bidirectional_attention": False})
    layers = config.get("num_hidden_layers", 0)
    kinds = [FULL if (layer + 1) % pattern == 0 else SLIDING for layer in range(layers)]
    biased = bool(config.get("attention_bias", False))
    found = decoder_fields({**_DEFAULTS, **config, "rope_parameters": None, "rope_scaling": None})
    return {
        **found,
        **rope,
        **windows(config.get("layer_types") or kinds, config.get("sliding_window", 4096)),
        "activation": activation(config, _ACT, _TANH),
        "norm": "rms_plus_one",
        "post_norms": True,
        "qkv_bias": biased,
        "output_bias": biased,
        "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "embed_scale": math.sqrt(found["width"]),
    }


def _publish(config: ModelConfig, model_type: str) -> dict[str, Any]:
    published = decoder_json(config, model_type) | published_windows(config)
    published[_ACT] = published.pop("hidden_act")
    return published | {
        "attention_bias": config.output_bias,
        "query_pre_attn_scalar": square_root(config.attention_scale or config.head_dim**-0.5),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def _softcaps(config: Json, attention: float | None, logits: float | None) -> dict[str, Any]:
    return {
        "attention_softcap": config.get("attn_logit_softcapping", attention) or 0.0,
        "logit_softcap": config.get("final_logit_softcapping", logits) or 0.0,
    }


def gemma2() -> Family:
    """Gemma 2: every other layer has a window."""

    def fields(config):
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        found = rope_fields(rope, config.get("rope_theta", 10000.0))
        return _fields(config, found, pattern=2) | _softcaps(config, 50.0, 30.0)

    return Family(fields, lambda c: _publish(c, "gemma2"), GEMMA2_NAMES, classes_of("Gemma2"))


def _both_ropes(config: Json) -> dict[str, Any]:
    """The rotary fields of Gemma 3, whose kinds of layer differ in them."""
    rope = config.get("rope_parameters") or {}
    if not any(isinstance(value, Mapping) for value in rope.values()):
        # Before transformers 5: two bases, and a scaling for layers without a window.
        rope = {
            FULL: {
                "rope_theta": config.get("rope_theta", 1e6),
                **(config.get("rope_scaling") or {}),
            },
            SLIDING: {"rope_theta": config.get("rope_local_base_freq", 10000.0)},
        }
    local = rope_fields(rope.get(SLIDING) or {}, 10000.0)
    if set(local) != {"rope_theta"}:
        raise ValueError(f"config.json: rope_parameters scale layers of {SLIDING}: {rope[SLIDING]}")
    return rope_fields(rope.get(FULL) or {}, 1e6) | {"rope_theta_local": local["rope_theta"]}


def gemma3() -> Family:
    """The text models of Gemma 3: five layers with a window, one without."""

    def fields(config):
        pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
        found = _fields(config, _both_ropes(config), pattern)
        return found | _softcaps(config, None, None) | {"qk_norm": True}

    def publish(config):
        local = {"rope_type": "default", "rope_theta": float(config.rope_theta_local)}
        rope = {FULL: published_rope(config), SLIDING: local}
        return _publish(config, "gemma3_text") | {"rope_parameters": rope}

    # transformers 5.23 has no class of this family that scores tokens.
    classes = {
        "policy": "Gemma3ForCausalLM",
        "outcome": "Gemma3TextForSequenceClassification",
    }
    return Family(fields, publish, NAMES, MappingProxyType(classes))
