"""Llama and Mistral as published. Data, no mathematics.

Llama: Touvron et al. 2023, https://arxiv.org/abs/2302.13971, and the herd of Llama 3 (Dubey et al.
2024, https://arxiv.org/abs/2407.21783) with its scaled rotary positions. Mistral (Jiang et al.
2023, https://arxiv.org/abs/2310.06825) is Llama with a sliding window. Names are those of
transformers' LlamaForCausalLM.
"""

from collections.abc import Mapping
from types import MappingProxyType

from rlhf_jax.models.family import (
    FULL,
    SLIDING,
    Family,
    Published,
    activation,
    classes_of,
    decoder_fields,
    decoder_json,
    refuse,
    windows,
)

LAYER = "model.layers.{layer}"
_PROJECTIONS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
NAMES: Mapping[str, Published] = MappingProxyType(
    {
        "embed/table": Published("model.embed_tokens.weight"),
        "layers/attention_norm/scale": Published(f"{LAYER}.input_layernorm.weight"),
        "layers/mlp_norm/scale": Published(f"{LAYER}.post_attention_layernorm.weight"),
        "final_norm/scale": Published("model.norm.weight"),
        "unembed/kernel": Published("lm_head.weight"),
    }
    | {f"layers/{o}/kernel": Published(f"{LAYER}.{t}.weight") for o, t in _PROJECTIONS.items()}
    | {f"layers/{o}/bias": Published(f"{LAYER}.{t}.bias") for o, t in _PROJECTIONS.items()}
)


def llama() -> Family:
    """Llama 1 to 3.2, and everything else saved as model_type "llama"."""

    def fields(config):
        refuse(config, {"pretraining_tp": 1})
        biased = bool(config.get("attention_bias", False))
        return {
            **decoder_fields(config),
            **windows(config.get("layer_types") or [], None),
            "activation": activation(config),
            "qkv_bias": biased,
            "output_bias": biased,
            "mlp_bias": bool(config.get("mlp_bias", False)),
        }

    def publish(config):
        biases = {"attention_bias": config.output_bias, "mlp_bias": config.mlp_bias}
        return decoder_json(config, "llama") | biases

    return Family(fields, publish, NAMES, classes_of("Llama"))


def mistral() -> Family:
    """Mistral: one window for all layers, or none."""

    def fields(config):
        window = config.get("sliding_window", 4096)  # transformers' default where it is absent
        kinds = [SLIDING if window else FULL] * config.get("num_hidden_layers", 0)
        return {
            **decoder_fields(config),
            "activation": activation(config),
            **windows(config.get("layer_types") or kinds, window),
        }

    def publish(config):
        return decoder_json(config, "mistral") | {"sliding_window": config.window or None}

    return Family(fields, publish, NAMES, classes_of("Mistral"))
