"""Qwen2 (with 2.5) and Qwen3 as published: Llama with two small differences.

Qwen2 adds biases to queries, keys and values (https://arxiv.org/abs/2407.10671); Qwen3 drops
them and normalises queries and keys per head (https://arxiv.org/abs/2505.09388).
"""

from types import MappingProxyType

from rlhf_jax.models.llama import NAMES, Family, decoder_fields, refuse

_ATTENTION = "layers/attention"
_PUBLISHED = "model.layers.{layer}.self_attn"

QWEN2_NAMES = MappingProxyType(
    {
        **NAMES,
        f"{_ATTENTION}/query/bias": f"{_PUBLISHED}.q_proj.bias",
        f"{_ATTENTION}/key/bias": f"{_PUBLISHED}.k_proj.bias",
        f"{_ATTENTION}/value/bias": f"{_PUBLISHED}.v_proj.bias",
    }
)
QWEN3_NAMES = MappingProxyType(
    {
        **NAMES,
        f"{_ATTENTION}/query_norm/scale": f"{_PUBLISHED}.q_norm.weight",
        f"{_ATTENTION}/key_norm/scale": f"{_PUBLISHED}.k_norm.weight",
    }
)


def qwen2() -> Family:
    """Qwen2 and Qwen2.5: biases on queries, keys and values, always."""

    def fields(config):
        return {**decoder_fields(config), "qkv_bias": True}

    return Family(fields=fields, names=QWEN2_NAMES)


def qwen3() -> Family:
    """Qwen3: RMS norm on each head's query and key; the head width is a key of its own."""

    def fields(config):
        refuse(config, {"attention_bias": False})
        # transformers' default where the key is absent, whatever the width
        return {**decoder_fields({"head_dim": 128, **config}), "qk_norm": True}

    return Family(fields=fields, names=QWEN3_NAMES)
