"""Small random models of every published family, made by transformers, in odd shapes."""

import pathlib

import torch
import transformers

# Widths that are no multiple of the heads, one key/value head, vocabularies that nothing divides.
_ODD = dict(
    vocab_size=101,
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=10,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_HALF = dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5)
_GEMMA3_ROPE = dict(
    sliding_attention=dict(rope_type="default", rope_theta=50.0),
    full_attention=dict(rope_type="linear", rope_theta=500.0, factor=2.0),
)

CONFIGS = {
    "llama": transformers.LlamaConfig(**_ODD),
    "llama 3.1": transformers.LlamaConfig(**_ODD, rope_parameters=_LLAMA3),
    "llama, biases": transformers.LlamaConfig(
        **_ODD, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": transformers.MistralConfig(**_ODD, sliding_window=5),
    "mistral, no window": transformers.MistralConfig(**_ODD, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**{**_ODD, "hidden_size": 40}),
    "qwen2, windows": transformers.Qwen2Config(
        **{**_ODD, "hidden_size": 40},
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3": transformers.Qwen3Config(**_ODD, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(
        **_ODD, sliding_window=5, layer_types=_ALTERNATING, query_pre_attn_scalar=7
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **_ODD,
        sliding_window=5,
        layer_types=_ALTERNATING,
        query_pre_attn_scalar=7,
        rope_parameters=_GEMMA3_ROPE,
    ),
    "glm": transformers.GlmConfig(**{**_ODD, "head_dim": 12}, rope_parameters=_HALF),
    "glm4": transformers.Glm4Config(**{**_ODD, "head_dim": 12}, rope_parameters=_HALF),
    "gpt2": transformers.GPT2Config(
        vocab_size=101, n_embd=36, n_layer=3, n_head=4, n_positions=128, n_inner=50,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ),
}  # fmt: skip


def make(name: str, kind=transformers.AutoModelForCausalLM, seed: int = 0, **changes):
    """A random model in evaluation mode, every parameter moved from where it starts.

    Args:
        kind: the auto class, for example with a head that scores.
        changes: keys of the config that are replaced.
    """
    config = CONFIGS[name].__class__(**{**CONFIGS[name].to_dict(), **changes})
    model = kind.from_config(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def save(model, folder: pathlib.Path) -> pathlib.Path:
    """The model as a folder, as its users write it."""
    model.save_pretrained(folder)
    return folder
