"""The shape and numerics of a decoder: one static dataclass, and published sizes by name."""

import dataclasses

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
DTYPES = ("float32", "bfloat16", "float16")
REMATS = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama and Qwen kind: RMSNorm, RoPE, grouped queries, SwiGLU.

    Attributes:
        head_dim: width of one head; ``heads * head_dim`` need not equal `width`.
        qkv_bias: biases on query, key and value (Qwen2).
        qk_norm: RMSNorm of queries and keys over the head width, before RoPE (Qwen3).
        tie_embeddings: logits are made with the embedding table.
        lm_head: False gives a model without logits (value and reward models).
        score_heads: names of scalar heads, one number per token each.
        param_dtype: type of the stored parameters.
        compute_dtype: type of matrix products; residual stream, norms, softmax, RoPE, logits
            and scores stay float32.
        remat: what a backward pass keeps per layer: "none" recomputes nothing, "dots" keeps
            the outputs of the projections, "full" keeps only the layer's input.
        logprob_chunk: tokens per chunk of the log-probabilities, so that logits exist for
            one chunk at a time.
        lora_rank: rank of the adapters; 0 = none.
        lora_alpha: adapters are scaled by ``lora_alpha / lora_rank``.
        lora_targets: projections that carry adapters.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: int | float = 10000.0
    norm_eps: int | float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    lm_head: bool = True
    score_heads: tuple[str, ...] = ()
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "none"
    logprob_chunk: int = 128
    lora_rank: int = 0
    lora_alpha: int | float = 16.0
    lora_targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim"):
            _check_positive(name, getattr(self, name))
        for name in ("mlp_width", "logprob_chunk", "rope_theta", "norm_eps", "lora_alpha"):
            _check_positive(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}; "
                "every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}; RoPE rotates pairs, want it even")
        if self.lora_rank < 0:
            raise ValueError(f"model.lora_rank={self.lora_rank}; want 0 (no adapters) or more")
        _check_known("param_dtype", self.param_dtype, DTYPES)
        _check_known("compute_dtype", self.compute_dtype, DTYPES)
        _check_known("remat", self.remat, REMATS)
        for target in self.lora_targets:
            _check_known("lora_targets", target, PROJECTIONS)
        if len(set(self.score_heads)) != len(self.score_heads):
            raise ValueError(f"model.score_heads={self.score_heads} names a head twice")


def _check_positive(name: str, value: int | float):
    if not value > 0:
        raise ValueError(f"model.{name}={value}; want a positive number")


def _check_known(name: str, value: str, known: tuple[str, ...]):
    if value not in known:
        raise ValueError(f"model.{name}={value!r}; known: {', '.join(known)}")


_QWEN2 = dict(rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, vocab_size=151936)
_QWEN3 = dict(rope_theta=1e6, norm_eps=1e-6, qk_norm=True, vocab_size=151936, head_dim=128)
_LLAMA3 = dict(rope_theta=500000.0, norm_eps=1e-5, vocab_size=128256)


def _dims(width: int, layers: int, heads: int, kv_heads: int, mlp_width: int) -> dict[str, int]:
    return dict(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=mlp_width,
    )


_SIZES = {
    # Ours: tests and the quickstart; the vocabulary fits a byte tokenizer.
    "tiny": dict(_dims(64, 2, 4, 2, 128), vocab_size=260),
    "small": dict(_dims(128, 3, 4, 4, 384), vocab_size=260),
    # llama2.c stories260K (Karpathy, 2023), https://huggingface.co/karpathy/tinyllamas
    "stories260k": dict(_dims(64, 5, 8, 4, 172), vocab_size=512),
    # config.json of https://huggingface.co/Qwen/Qwen2.5-0.5B, -1.5B and -7B
    "0.5b": dict(_dims(896, 24, 14, 2, 4864), **_QWEN2),
    "1.5b": dict(_dims(1536, 28, 12, 2, 8960), **_QWEN2),
    "7b": {**_dims(3584, 28, 28, 4, 18944), **_QWEN2, "vocab_size": 152064}
    | dict(tie_embeddings=False),
    # config.json of https://huggingface.co/Qwen/Qwen3-0.6B, -1.7B and -4B
    "0.6b": _dims(1024, 28, 16, 8, 3072) | _QWEN3,
    "1.7b": _dims(2048, 28, 16, 8, 6144) | _QWEN3,
    "4b": _dims(2560, 36, 32, 8, 9728) | _QWEN3,
    # Llama 3 herd (Dubey et al. 2024), https://arxiv.org/abs/2407.21783, table 3; 1B:
    # config.json of https://huggingface.co/meta-llama/Llama-3.2-1B (without its RoPE scaling)
    "1b": dict(_dims(2048, 16, 32, 8, 8192), **_LLAMA3),
    "8b": dict(_dims(4096, 32, 32, 8, 14336), **_LLAMA3, tie_embeddings=False),
}


def named_size(name: str, **overrides) -> ModelConfig:
    """The configuration of a named size, with fields replaced.

    Example:
        >>> named_size("tiny", score_heads=("value",)).width
        64
    """
    if name not in _SIZES:
        raise ValueError(f"model.name={name!r}; known sizes: {', '.join(_SIZES)}")
    return ModelConfig(**{**_SIZES[name], **overrides})
