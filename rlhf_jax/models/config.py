"""The shape and numerics of a decoder: one static dataclass, and published sizes by name."""

import dataclasses

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
DTYPES = ("float32", "bfloat16", "float16")
REMATS = ("products", "none", "full", "dots")
NORMS = ("rms", "rms_plus_one", "layer")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
POSITIONS = ("rope", "learned")
ROPE_SCALINGS = ("none", "linear", "llama3")
ENSEMBLES = ("none", "independent", "linear", "lora")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. The defaults are Llama's: RMSNorm, RoPE, grouped queries, SwiGLU; the other
    values of a field are those of the family that is named beside it.

    Attributes:
        head_dim: width of one head; ``heads * head_dim`` need not equal `width`.
        rope_fraction: the share of a head's width that is rotated, its first part (GLM: 0.5).
        rope_interleaved: pairs are neighbours (2i, 2i + 1), not halves (GLM).
        rope_scaling: "linear" divides all frequencies by `rope_factor` (Gemma 3); "llama3"
            divides the low ones and blends in between (Llama 3.1), with wavelengths from
            ``rope_original / rope_high`` to ``rope_original / rope_low`` tokens as the border.
        rope_theta_local: base in layers with a window, never scaled; 0 = as in all others.
        positions: "learned" adds a table of `max_positions` rows to the embeddings (GPT-2).
        norm: "rms_plus_one" scales by 1 + scale (Gemma), "layer" also centres and shifts (GPT-2).
        post_norms: a norm after attention and one after the MLP, before the sums (Gemma, GLM-4).
        activation: of the MLP.
        gated_mlp: two projections up, one through the activation; False: one (GPT-2).
        mlp_bias: biases in the MLP (GPT-2).
        qkv_bias: biases on query, key and value (Qwen2, GLM, GPT-2).
        output_bias: a bias on attention's output (GPT-2).
        qk_norm: norm of queries and keys over the head width, before RoPE (Qwen3, Gemma 3).
        window: columns that a local layer sees, the token's own included; 0 = all (Mistral).
        local_layers: which layers have the window, one truth value each; () = all of them.
        attention_scale: scores are multiplied by it; 0 = 1/√head_dim (Gemma has its own).
        attention_softcap: c in c·tanh(scores / c); 0 = none (Gemma 2).
        logit_softcap: the same of the logits (Gemma 2).
        embed_scale: embeddings are multiplied by it (Gemma: √width).
        tie_embeddings: logits are made with the embedding table.
        lm_head: False gives a model without logits (value and reward models).
        score_heads: names of scalar heads, one number per token each.
        param_dtype: type of the stored parameters; that of adapters is always float32.
        compute_dtype: type of matrix products; residual stream, norms, softmax, RoPE, logits
            and scores stay float32.
        remat: what a backward pass keeps per layer: "none" recomputes nothing; "products" keeps
            the results of projections and of attention, so that only scores, softmax and what is
            done element by element is computed again (on CPUs faster than "none", and less
            memory); "dots" those of the projections, "full" only the layer's input.
        logprob_chunk: tokens per chunk of the log-probabilities, so that logits exist for
            one chunk at a time.
        layer_chunk: tokens per chunk of whole rows that go through a layer one after the other
            (blockwise: Liu & Abbeel 2023, https://arxiv.org/abs/2305.19370), in scoring and
            training; 0 = all at once. A CPU is faster on what its cache holds, about 1,000 tokens
            of width 512; without effect elsewhere and on a mesh of several devices.
        lora_rank: rank of the adapters; 0 = none.
        lora_alpha: adapters are scaled by ``lora_alpha / lora_rank``.
        lora_targets: projections that carry adapters.
        members: how many reward models this is; 1 = one model.
        ensemble: what members have of their own; see `rlhf_jax.models.members`.
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
    rope_fraction: int | float = 1.0
    rope_interleaved: bool = False
    rope_scaling: str = "none"
    rope_factor: int | float = 1.0
    rope_low: int | float = 1.0
    rope_high: int | float = 4.0
    rope_original: int = 8192
    rope_theta_local: int | float = 0.0
    positions: str = "rope"
    max_positions: int = 0
    norm: str = "rms"
    post_norms: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    window: int = 0
    local_layers: tuple[bool, ...] = ()
    attention_scale: int | float = 0.0
    attention_softcap: int | float = 0.0
    logit_softcap: int | float = 0.0
    embed_scale: int | float = 1.0
    tie_embeddings: bool = True
    lm_head: bool = True
    score_heads: tuple[str, ...] = ()
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "products"
    logprob_chunk: int = 128
    layer_chunk: int = 0
    lora_rank: int = 0
    lora_alpha: int | float = 16.0
    lora_targets: tuple[str, ...] = PROJECTIONS
    members: int = 1
    ensemble: str = "none"

    def __post_init__(self):
        for name in _POSITIVE:
            _check_positive(name, getattr(self, name))
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)}; want 0 (off) or more")
        for name, known in _KNOWN.items():
            _check_known(name, getattr(self, name), known)
        for target in self.lora_targets:
            _check_known("lora_targets", target, PROJECTIONS)
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}; "
                "every key/value head serves the same number of query heads"
            )
        self._check_positions()
        if self.local_layers and (not self.window or len(self.local_layers) != self.layers):
            raise ValueError(
                f"model.local_layers has {len(self.local_layers)} values with model.window="
                f"{self.window}; want one for each of {self.layers} layers, and a window"
            )
        if len(set(self.score_heads)) != len(self.score_heads):
            raise ValueError(f"model.score_heads={self.score_heads} names a head twice")
        self._check_members()

    def _check_positions(self):
        odd = self.rotary_dim % 2 or not 0 < self.rope_fraction <= 1
        if self.positions == "rope" and odd:
            raise ValueError(
                f"model.head_dim={self.head_dim} with model.rope_fraction={self.rope_fraction}: "
                "RoPE rotates pairs, want an even number of at most head_dim"
            )
        if (self.positions == "learned") != (self.max_positions > 0):
            raise ValueError(
                f"model.max_positions={self.max_positions} with model.positions="
                f"{self.positions!r}; learned positions need their number, others have none"
            )

    def _check_members(self):
        if (self.members > 1) != (self.ensemble != "none"):
            raise ValueError(
                f"members={self.members} with ensemble={self.ensemble!r}; an ensemble has a family "
                "and 2 or more members, one model is 1 member of no family"
            )
        if self.members > 1 and (self.lm_head or not self.score_heads):
            raise ValueError(
                f"members={self.members}: an ensemble is a reward model; it has score heads and no "
                "LM head"
            )
        if (self.ensemble == "lora") and not self.lora_rank:
            raise ValueError("ensemble='lora' needs adapters; set model.lora_rank")
        if (self.ensemble == "independent") and self.lora_rank:
            raise ValueError(
                f"ensemble='independent' with model.lora_rank={self.lora_rank}: whole models have "
                "no adapters; take ensemble='lora', or model.lora_rank=0"
            )

    @property
    def local(self) -> tuple[bool, ...]:
        """Which layers have a window."""
        return self.local_layers or (self.window > 0,) * self.layers

    @property
    def keep_logits(self) -> bool:
        """Whether a backward pass keeps the logits: where it keeps products, and no more numbers of
        them than of one layer."""
        heads = 2 * (self.heads + self.kv_heads) * self.head_dim
        of_layer = heads + self.width + (1 + self.gated_mlp) * self.mlp_width
        return self.remat != "full" and self.vocab_size <= of_layer

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head RoPE rotates."""
        return int(self.head_dim * self.rope_fraction)


_POSITIVE = (
    "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width", "rope_theta",
    "rope_factor", "rope_low", "rope_high", "rope_original", "norm_eps", "embed_scale",
    "logprob_chunk", "lora_alpha", "members",
)  # fmt: skip
_NOT_NEGATIVE = (
    "max_positions", "window", "rope_theta_local", "attention_scale", "attention_softcap",
    "logit_softcap", "layer_chunk", "lora_rank",
)  # fmt: skip
_KNOWN = {
    "param_dtype": DTYPES,
    "compute_dtype": DTYPES,
    "remat": REMATS,
    "norm": NORMS,
    "activation": ACTIVATIONS,
    "positions": POSITIONS,
    "rope_scaling": ROPE_SCALINGS,
    "ensemble": ENSEMBLES,
}


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
