"""GLM-4 as published: the family of "Does RLHF Scale?" (https://arxiv.org/abs/2412.06000).

The first half of each head is rotated, in neighbouring pairs; gate and up are one tensor
(https://arxiv.org/abs/2406.12793). GLM-4-0414 (model_type "glm4") adds norms after attention and
MLP.
"""

from types import MappingProxyType
from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.family import (
    Family,
    Json,
    Published,
    activation,
    classes_of,
    decoder_fields,
    decoder_json,
)
from rlhf_jax.models.llama import LAYER
from rlhf_jax.models.llama import NAMES as LLAMA

_FUSED = f"{LAYER}.mlp.gate_up_proj.weight"
NAMES = MappingProxyType(
    {
        **LLAMA,
        "layers/mlp/gate/kernel": Published(_FUSED, 0, 2),
        "layers/mlp/up/kernel": Published(_FUSED, 1, 2),
    }
)
GLM4_NAMES = MappingProxyType(
    {
        **NAMES,
        "layers/attention_post_norm/scale": Published(f"{LAYER}.post_self_attn_layernorm.weight"),
        "layers/mlp_post_norm/scale": Published(f"{LAYER}.post_mlp_layernorm.weight"),
    }
)


def _fields(config: Json) -> dict[str, Any]:
    fraction = config.get("partial_rotary_factor", 0.5)
    eps = config.get("rms_norm_eps", 1.5625e-07)
    kv_heads = config.get("num_key_value_heads", 2)
    defaults = {"head_dim": 128, "num_key_value_heads": kv_heads, "rms_norm_eps": eps}
    return {
        "rope_fraction": fraction,
        **decoder_fields({**config, **{k: config.get(k, v) for k, v in defaults.items()}}),
        "rope_interleaved": True,
        "activation": activation(config),
        "qkv_bias": bool(config.get("attention_bias", True)),
    }


def _publish(config: ModelConfig, model_type: str) -> dict[str, Any]:
    published = decoder_json(config, model_type)
    # transformers takes one half where nothing is said, so all must be said too
    published["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
    return published | {"attention_bias": config.qkv_bias}


def glm() -> Family:
    """GLM-4-9B as first published."""
    return Family(_fields, lambda c: _publish(c, "glm"), NAMES, classes_of("Glm"))


def glm4() -> Family:
    """GLM-4-0414: also norms after attention and MLP."""

    def fields(config):
        return _fields(config) | {"post_norms": True}

    return Family(fields, lambda c: _publish(c, "glm4"), GLM4_NAMES, classes_of("Glm4"))
