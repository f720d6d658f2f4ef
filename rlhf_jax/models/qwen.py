"""Qwen2 (with 2.5) and Qwen3 as published: Llama with two small differences.

Qwen2 adds biases to queries, keys and values (https://arxiv.org/abs/2407.10671); Qwen3 drops
them and normalises queries and keys per head (https://arxiv.org/abs/2505.09388).
"""

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
    published_windows,
    windows,
)
from rlhf_jax.models.llama import LAYER, NAMES

QWEN3_NAMES = MappingProxyType(
    {
        **NAMES,
        "layers/attention/query_norm/scale": Published(f"{LAYER}.self_attn.q_norm.weight"),
        "layers/attention/key_norm/scale": Published(f"{LAYER}.self_attn.k_norm.weight"),
    }
)


def _fields(config: Json) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    layers = config.get("num_hidden_layers", 0)
    kinds = [SLIDING if window and layer >= first else FULL for layer in range(layers)]
    return {
        **decoder_fields(config),
        "activation": activation(config),
        **windows(config.get("layer_types") or kinds, window),
    }


def _publish(config: ModelConfig, model_type: str) -> dict[str, Any]:
    windowed = {"use_sliding_window": config.window > 0, **published_windows(config)}
    return decoder_json(config, model_type) | windowed


def qwen2() -> Family:
    """Qwen2 and Qwen2.5: biases on queries, keys and values, always."""

    def fields(config):
        return _fields(config) | {"qkv_bias": True}

    def publish(config):
        published = _publish(config, "qwen2")
        # Its heads are always as wide as the model's width allows.
        return {key: value for key, value in published.items() if key != "head_dim"}

    return Family(fields, publish, NAMES, classes_of("Qwen2"))


def qwen3() -> Family:
    """Qwen3: RMS norm on each head's query and key; the head width is a key of its own."""

    def fields(config):
        biased = bool(config.get("attention_bias", False))
        # transformers' default width where the key is absent, whatever the model's
        found = _fields({"head_dim": 128, **config})
        return found | {"qk_norm": True, "qkv_bias": biased, "output_bias": biased}

    def publish(config):
        return _publish(config, "qwen3") | {"attention_bias": config.output_bias}

    return Family(fields, publish, QWEN3_NAMES, classes_of("Qwen3"))
