"""GPT-2 as published (Radford et al. 2019): learned positions, LayerNorm, biases everywhere.

Its tensors keep inputs first, and query, key and value are one tensor.
"""

from types import MappingProxyType

from rlhf_jax.models.family import (
    Family,
    Published,
    activation,
    classes_of,
    published_activation,
    refuse,
    require,
)

_LAYER = "transformer.h.{layer}"
_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
_WHOLE = {"attention/output": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}


def _both(ours: str, theirs: str, part: int = 0, parts: int = 1) -> dict[str, Published]:
    return {
        f"{ours}/kernel": Published(f"{theirs}.weight", part, parts, outputs_first=False),
        f"{ours}/bias": Published(f"{theirs}.bias", part, parts),
    }


def _names() -> dict[str, Published]:
    names = {
        "embed/table": Published("transformer.wte.weight"),
        "positions/table": Published("transformer.wpe.weight"),
        "final_norm/scale": Published("transformer.ln_f.weight"),
        "final_norm/bias": Published("transformer.ln_f.bias"),
        "unembed/kernel": Published("lm_head.weight"),
    }
    for ours, theirs in _NORMS.items():
        names[f"layers/{ours}/scale"] = Published(f"{_LAYER}.{theirs}.weight")
        names[f"layers/{ours}/bias"] = Published(f"{_LAYER}.{theirs}.bias")
    for ours, theirs in _WHOLE.items():
        names |= _both(f"layers/{ours}", f"{_LAYER}.{theirs}")
    for part, ours in enumerate(("query", "key", "value")):
        names |= _both(f"layers/attention/{ours}", f"{_LAYER}.attn.c_attn", part, 3)
    return names


NAMES = MappingProxyType(_names())


def gpt2() -> Family:
    """GPT-2 in all its sizes."""

    def fields(config):
        require(config, "vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
        refuse(config, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False})
        refuse(config, {"add_cross_attention": False})
        width, heads = config["n_embd"], config["n_head"]
        return {
            "vocab_size": config["vocab_size"],
            "width": width,
            "layers": config["n_layer"],
            "heads": heads,
            "kv_heads": heads,
            "head_dim": width // heads,
            "mlp_width": config.get("n_inner") or 4 * width,
            "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
            "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
            "positions": "learned",
            "max_positions": config["n_positions"],
            "norm": "layer",
            "activation": activation(config, "activation_function", "gelu_new"),
            "gated_mlp": False,
            "mlp_bias": True,
            "qkv_bias": True,
            "output_bias": True,
        }

    def publish(config):
        return {
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_positions": config.max_positions,
            "n_inner": config.mlp_width,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": published_activation(config.activation),
            "tie_word_embeddings": config.tie_embeddings,
        }

    return Family(
        fields,
        publish,
        NAMES,
        classes_of("GPT2", policy="GPT2LMHeadModel"),
        prefix="transformer.",
        classifier=MappingProxyType({"process": "classifier"}),
        ignored=(".attn.bias", ".attn.masked_bias"),
    )
