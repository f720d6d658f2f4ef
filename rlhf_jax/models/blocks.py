"""The layers of the decoder, in Flax Linen; nothing outside this package sees them.

Llama architecture (Touvron et al. 2023, https://arxiv.org/abs/2302.13971) with the options that
other published families need (see `ModelConfig`):

    x ← x + [Norm] Attention(Norm(x)),   x ← x + [Norm] MLP(Norm(x))

Residual stream, norms, RoPE and softmax are float32; matrix products use `compute_dtype`.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int, Shaped

from rlhf_jax.mesh import ShardingRules, constrain
from rlhf_jax.models.attention import (
    KEPT,
    KeysValues,
    PrefixKeysValues,
    attention,
    blocks_of,
    causal_attention,
)
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.rope import SinCos, rotate
from rlhf_jax.models.turned import TURNED, few_rows
from rlhf_jax.types import Array

Length = Int[Array, ""] | Int[Array, " B"]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class Sight(NamedTuple):
    """What the layers of one kind, with or without a window, look at.

    rotary: sin and cos of each position's angles; None without RoPE.
    attend: which columns each position may see: those of a prefix, then the rows' own.
    """

    rotary: SinCos | None
    attend: Bool[Array, "B S A"]


class GroupSight(NamedTuple):
    """What the parts of a row of a group look at (see `Layout` of `models.passes`): prompts at
    their own columns [N P P], samples at those and then at their own [B T P+T]."""

    prompts: Sight
    samples: Sight


class Past(NamedTuple):
    """One layer's part of a cache.

    own: the rows' own columns.
    start: where in them the new ones go.
    prefix: the columns before, each row for all B/N rows of a group; None where there are none.
    """

    own: KeysValues
    start: Length
    prefix: PrefixKeysValues | None = None


class Norm(nn.Module):
    """x / √(mean(x²) + ε) · scale over the last axis, in float32 (RMSNorm; Zhang & Sennrich 2019,
    https://arxiv.org/abs/1910.07467). "rms_plus_one" scales by 1 + scale; "layer" takes the mean
    off first and adds a bias (LayerNorm; Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""

    kind: str
    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        dtype = jnp.dtype(self.param_dtype)
        plus_one, layer = self.kind == "rms_plus_one", self.kind == "layer"
        start = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), dtype).astype(jnp.float32)
        x = x.astype(jnp.float32)
        if layer:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        # Not an einsum: its gradient by the scale is a product for each of D, slow on CPUs.
        x = x * jnp.broadcast_to(1.0 + scale if plus_one else scale, x.shape)
        if layer:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), dtype)
            x = x + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
        return x


def norm_of(config: ModelConfig, name: str | None = None) -> Norm:
    """A norm of the kind that `config` names."""
    return Norm(config.norm, config.norm_eps, config.param_dtype, name=name)


class Projection(nn.Module):
    """y = x W (+ b) (+ (α/r) (x A) B), contracting the last ``len(inputs)`` axes of x.

    The adapter is that of LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): B starts at
    zero, so a fresh adapter changes nothing. A decode loop may give W turned (`models.turned`).
    """

    config: ModelConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool = False
    scale: float = 1.0  # of the initial weights, relative to 1/√(fan in)
    dtype: str = "float32"  # of the result

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        config = self.config
        fan_in = math.prod(self.inputs)
        normal = nn.initializers.normal(fan_in**-0.5)
        scaled = nn.initializers.normal(self.scale * fan_in**-0.5)
        y = self._product(x, "kernel", scaled, self.inputs + self.outputs, len(self.inputs))
        if self.name in config.lora_targets and config.lora_rank > 0:
            rank = (config.lora_rank,)
            low = self._product(x, "lora_a", normal, self.inputs + rank, len(self.inputs))
            low = checkpoint_name(low, KEPT)
            zeros = nn.initializers.zeros
            up = self._product(low, "lora_b", zeros, rank + self.outputs, 1)
            y = y + (config.lora_alpha / config.lora_rank) * up
        if self.bias:
            dtype = jnp.dtype(config.param_dtype)
            bias = self.param("bias", nn.initializers.zeros, self.outputs, dtype)
            y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        return checkpoint_name(y, KEPT)  # the sum alone, not what it is made of

    def _product(self, x, name, init, shape, axes):
        """x · W with operands in the compute type, the result in `dtype`.

        Adapters are stored as float32 whatever the base is: they are small, and steps that train
        them would be lost in the rounding of bfloat16.
        """
        if name == "kernel" and self.has_variable("params", TURNED):
            lead = x.shape[: x.ndim - axes]
            few = few_rows(x.reshape(*lead, -1), self.get_variable("params", TURNED))
            return few.reshape(*lead, *shape[axes:])
        stored = "float32" if name.startswith("lora_") else self.config.param_dtype
        weight = self.param(name, init, shape, jnp.dtype(stored))
        compute = jnp.dtype(self.config.compute_dtype)
        # One axis of rows: with two, the gradient of W is contracted over both, and XLA on CPUs
        # transposes a copy of dy first and multiplies at half the speed.
        rows = x.reshape(-1, *x.shape[x.ndim - axes :]).astype(compute)
        y = product(rows, weight.astype(compute), axes, self.dtype)
        return y.reshape(*x.shape[: x.ndim - axes], *shape[axes:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
    x: Float[Array, "M ..."], weight: Float[Array, "..."], axes: int, dtype: str
) -> Float[Array, "M ..."]:
    """x · W, contracting the last `axes` axes of x with the first of W; `dtype` is the result's.

    The gradient of W is written out as xᵀ dy: the derived one is dyᵀ x, transposed, and where W
    has two axes of outputs XLA on CPUs transposes both dy and the result by copying.
    """
    return jnp.tensordot(x, weight, axes, preferred_element_type=dtype)


def _product_kept(x, weight, axes, dtype):
    # Not `product` itself, in which remat="dots" would see no product to keep.
    return jnp.tensordot(x, weight, axes, preferred_element_type=dtype), (x, weight)


def _product_back(axes, dtype, kept, dy):
    x, weight = kept
    outputs = (tuple(range(1, dy.ndim)), tuple(range(axes, weight.ndim)))
    dx = jax.lax.dot_general(dy, weight, (outputs, ((), ())), preferred_element_type=dtype)
    dw = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
    return dx.astype(x.dtype), dw.astype(weight.dtype)


product.defvjp(_product_kept, _product_back)


class Attention(nn.Module):
    """Grouped-query attention: H/G query heads share one key/value head."""

    config: ModelConfig
    rules: ShardingRules

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        sight: Sight | GroupSight,
        past: Past | None,
        since: int,
    ) -> tuple[Float[Array, "B S-{since} D"], KeysValues | None]:
        c = self.config
        query = self._heads("query", x[:, since:], c.heads)
        key = self._heads("key", x, c.kv_heads)
        value = self._heads("value", x, c.kv_heads)
        if c.qk_norm:
            query = norm_of(c, "query_norm")(query)
            key = norm_of(c, "key_norm")(key)
        keys = values = None
        if isinstance(sight, GroupSight):
            mixed = self._mix_groups(query, key, value, sight)
        else:
            query, keys, values = self._turned(query, key, value, sight.rotary)
            attend = sight.attend[:, since:]
            if past is None:
                mixed = self._causal(query, keys, values, attend)
            else:
                keys = write_columns(past.own[0], keys, past.start, axis=2)
                values = write_columns(past.own[1], values, past.start, axis=2)
                options = dict(prefix=past.prefix, **self._options())
                mixed = attention(query, keys, values, attend, **options)
        mixed = mixed.reshape(*mixed.shape[:2], c.heads, c.head_dim)
        mixed = constrain(mixed, ("batch", "length", "heads", "head_dim"), self.rules)
        scale = (2 * c.layers) ** -0.5
        shape = ((c.heads, c.head_dim), (c.width,))
        out = Projection(c, *shape, c.output_bias, scale, name="output")(mixed)
        return out, None if past is None else (keys, values)

    def _causal(self, query, keys, values, attend, prefix=None):
        """Whole where the length lies on several devices: a block would be on some of them."""
        blocks = blocks_of(query.shape[1]) if self.rules.length is None else 1
        options = dict(blocks=blocks, prefix=prefix, **self._options())
        return causal_attention(query, keys, values, attend, **options)

    def _options(self):
        return dict(scale=self.config.attention_scale, softcap=self.config.attention_softcap)

    def _turned(self, query, key, value, rotary):
        """Queries [B S G R Dh], of the last columns where they are fewer than the keys; keys and
        values [B G S Dh]: the layout in which decode writes stay in place on TPU and GPU."""
        c = self.config
        if rotary is not None:
            since = key.shape[1] - query.shape[1]
            last = tuple(part[:, since:] for part in rotary)
            query = rotate(query, last, interleaved=c.rope_interleaved)
            key = rotate(key, rotary, interleaved=c.rope_interleaved)
        compute = jnp.dtype(c.compute_dtype)
        query = query.astype(compute)
        query = query.reshape(*query.shape[:2], c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        return query, *(jnp.swapaxes(part, 1, 2).astype(compute) for part in (key, value))

    def _mix_groups(self, query, key, value, sight):
        """[N P+KT G R Dh]: prompts look at themselves, and each sample at its prompt and itself.
        Queries may leave out the first columns of the prompts."""
        rows, width = query.shape[0], sight.prompts.attend.shape[1]
        since = key.shape[1] - query.shape[1]
        sizes = sight.samples.attend.shape[:2]  # (B, T)
        heads = ((query, width - since), (key, width), (value, width))
        prompts = self._turned(*(x[:, :at] for x, at in heads), sight.prompts.rotary)
        samples = (x[:, at:].reshape(*sizes, *x.shape[2:]) for x, at in heads)
        samples = self._turned(*samples, sight.samples.rotary)
        first = self._causal(*prompts, sight.prompts.attend[:, since:])
        second = self._causal(*samples, sight.samples.attend, prompts[1:])
        second = second.reshape(rows, -1, *second.shape[2:])
        return jnp.concatenate([first, second], axis=1)

    def _heads(self, name, x, count):
        c = self.config
        y = Projection(c, (c.width,), (count, c.head_dim), c.qkv_bias, name=name)(x)
        axis = "heads" if name == "query" else "kv_heads"
        return constrain(y, ("batch", "length", axis, "head_dim"), self.rules)


def write_columns(
    columns: Shaped[Array, "B ..."], new: Shaped[Array, "B ..."], start: Length, *, axis: int
) -> Shaped[Array, "B ..."]:
    """The cache with `new` in columns start ... start+S-1 of `axis`.

    A slice update and not a scatter by fancy indexing, which copies the cache on TPU. One start
    for all rows is one update; a start per row is in place too, but TPUs run it as a loop over
    the rows (https://github.com/openxla/xla/issues/12982).
    """
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(columns, new, start, axis)

    def write(row, part, at):
        return jax.lax.dynamic_update_slice_in_dim(row, part, at, axis - 1)

    return jax.vmap(write)(columns, new, start)


class MLP(nn.Module):
    """W_down(f(W_gate x) ⊙ W_up x) (SwiGLU and its kin: Shazeer 2020,
    https://arxiv.org/abs/2002.05202), or W_down f(W_up x) without a gate."""

    config: ModelConfig
    rules: ShardingRules

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        c = self.config
        wide = dict(
            inputs=(c.width,), outputs=(c.mlp_width,), bias=c.mlp_bias, dtype=c.compute_dtype
        )
        activation = ACTIVATIONS[c.activation]
        up = Projection(c, **wide, name="up")(x)
        hidden = up.astype(jnp.float32)
        if c.gated_mlp:
            gate = Projection(c, **wide, name="gate")(x)
            hidden = activation(gate.astype(jnp.float32)) * hidden
        else:
            hidden = activation(hidden)
        hidden = constrain(hidden.astype(up.dtype), ("batch", "length", "mlp"), self.rules)
        shape = ((c.mlp_width,), (c.width,))
        scale = (2 * c.layers) ** -0.5
        return Projection(c, *shape, c.mlp_bias, scale, name="down")(hidden)


class Block(nn.Module):
    """One layer: attention and MLP, each on the normalised residual stream. Of the columns before
    `since` it makes keys and values alone: enough where nobody reads what comes out of them."""

    config: ModelConfig
    rules: ShardingRules

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        sight: Sight | GroupSight,
        past: Past | None = None,
        since: int = 0,
    ) -> tuple[Float[Array, "B S-{since} D"], KeysValues | None]:
        c = self.config
        normed = norm_of(c, "attention_norm")(x)
        mixed, written = Attention(c, self.rules, name="attention")(normed, sight, past, since)
        if c.post_norms:
            mixed = norm_of(c, "attention_post_norm")(mixed)
        x = x[:, since:] + mixed
        mixed = MLP(c, self.rules, name="mlp")(norm_of(c, "mlp_norm")(x))
        if c.post_norms:
            mixed = norm_of(c, "mlp_post_norm")(mixed)
        x = x + mixed
        return constrain(x, ("batch", "length", None), self.rules), written
