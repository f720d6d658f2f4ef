"""The layers of the decoder, in Flax Linen; nothing outside this package sees them.

Llama architecture (Touvron et al. 2023, https://arxiv.org/abs/2302.13971) with the options of
Qwen2 (biases on query, key, value) and Qwen3 (RMSNorm of queries and keys):

    x ← x + Attention(RMSNorm(x)),   x ← x + W_down(silu(W_gate n) ⊙ W_up n),  n = RMSNorm(x)

Residual stream, norms, RoPE and softmax are float32; matrix products use `compute_dtype`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from rlhf_jax.mesh import ShardingRules, constrain
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import Array

KeysValues = tuple[Float[Array, "B G C Dh"], Float[Array, "B G C Dh"]]
Length = Int[Array, ""] | Int[Array, " B"]
SinCos = tuple[Float[Array, "B S half"], Float[Array, "B S half"]]


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · scale over the last axis, in float32."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        dtype = jnp.dtype(self.param_dtype)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return jnp.einsum("...d,d->...d", x, scale.astype(jnp.float32))


class Projection(nn.Module):
    """y = x W (+ b) (+ (α/r) (x A) B), contracting the last ``len(inputs)`` axes of x.

    The adapter is that of LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): B starts at
    zero, so a fresh adapter changes nothing.
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
            zeros = nn.initializers.zeros
            up = self._product(low, "lora_b", zeros, rank + self.outputs, 1)
            y = y + (config.lora_alpha / config.lora_rank) * up
        if self.bias:
            dtype = jnp.dtype(config.param_dtype)
            bias = self.param("bias", nn.initializers.zeros, self.outputs, dtype)
            y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        return y

    def _product(self, x, name, init, shape, axes):
        """x · W with operands in the compute type, the result in `dtype`."""
        weight = self.param(name, init, shape, jnp.dtype(self.config.param_dtype))
        compute = jnp.dtype(self.config.compute_dtype)
        return jnp.tensordot(
            x.astype(compute), weight.astype(compute), axes, preferred_element_type=self.dtype
        )


def rope(positions: Int[Array, "B S"], head_dim: int, theta: int | float) -> SinCos:
    """sin and cos of the angles position · θ^(-2i/Dh), i < Dh/2 (Su et al. 2021, eq. 15,
    https://arxiv.org/abs/2104.09864)."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = jnp.einsum("bs,i->bsi", positions.astype(jnp.float32), theta**-exponents)
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x: Float[Array, "B S N Dh"], rotary: SinCos) -> Float[Array, "B S N Dh"]:
    """Rotates pairs (i, i + Dh/2): the half-split order of published checkpoints, not the
    paper's neighbouring pairs (2i, 2i + 1)."""
    sin, cos = (part[:, :, None, :] for part in rotary)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    """Grouped-query attention: H/G query heads share one key/value head."""

    config: ModelConfig
    rules: ShardingRules

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotary: SinCos,
        attend: Bool[Array, "B S C"],
        past: KeysValues | None,
        start: Length | None,
    ) -> tuple[Float[Array, "B S D"], KeysValues | None]:
        c = self.config
        query = self._heads("query", x, c.heads)
        key = self._heads("key", x, c.kv_heads)
        value = self._heads("value", x, c.kv_heads)
        if c.qk_norm:
            query = RMSNorm(c.norm_eps, c.param_dtype, name="query_norm")(query)
            key = RMSNorm(c.norm_eps, c.param_dtype, name="key_norm")(key)
        compute = jnp.dtype(c.compute_dtype)
        query = rotate(query, rotary).astype(compute)
        query = query.reshape(*query.shape[:2], c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        # [B G C Dh]: the layout in which decode writes stay in place on TPU and GPU.
        keys = jnp.swapaxes(rotate(key, rotary), 1, 2).astype(compute)
        values = jnp.swapaxes(value, 1, 2).astype(compute)
        if past is not None:
            keys = write_columns(past[0], keys, start, axis=2)
            values = write_columns(past[1], values, start, axis=2)
        mixed = attention(query, keys, values, attend)
        mixed = mixed.reshape(*x.shape[:2], c.heads, c.head_dim)
        mixed = constrain(mixed, ("batch", "length", "heads", "head_dim"), self.rules)
        scale = (2 * c.layers) ** -0.5
        out = Projection(c, (c.heads, c.head_dim), (c.width,), scale=scale, name="output")(mixed)
        return out, None if past is None else (keys, values)

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


def attention(
    query: Float[Array, "B S G R Dh"],
    keys: Float[Array, "B G C Dh"],
    values: Float[Array, "B G C Dh"],
    attend: Bool[Array, "B S C"],
) -> Float[Array, "B S G R Dh"]:
    """softmax(q·k / √Dh) v over the columns where `attend` is true; scores in float32.

    A row that may attend to nothing (a padded query) gets the plain mean of the values: its
    result is finite and nobody reads it.
    """
    scores = jnp.einsum("bsgrd,bgcd->bgrsc", query, keys, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    scores = jnp.where(attend[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bgrsc,bgcd->bsgrd", weights, values)


class MLP(nn.Module):
    """SwiGLU: W_down(silu(W_gate x) ⊙ W_up x) (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    config: ModelConfig
    rules: ShardingRules

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        c = self.config
        wide = dict(inputs=(c.width,), outputs=(c.mlp_width,), dtype=c.compute_dtype)
        gate = Projection(c, **wide, name="gate")(x)
        up = Projection(c, **wide, name="up")(x)
        hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        hidden = constrain(hidden.astype(up.dtype), ("batch", "length", "mlp"), self.rules)
        scale = (2 * c.layers) ** -0.5
        return Projection(c, (c.mlp_width,), (c.width,), scale=scale, name="down")(hidden)


class Block(nn.Module):
    """One layer: attention and MLP, each on the normalised residual stream."""

    config: ModelConfig
    rules: ShardingRules

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotary: SinCos,
        attend: Bool[Array, "B S C"],
        past: KeysValues | None = None,
        start: Length | None = None,
    ) -> tuple[Float[Array, "B S D"], KeysValues | None]:
        c = self.config
        normed = RMSNorm(c.norm_eps, c.param_dtype, name="attention_norm")(x)
        mixed, past = Attention(c, self.rules, name="attention")(
            normed, rotary, attend, past, start
        )
        x = x + mixed
        normed = RMSNorm(c.norm_eps, c.param_dtype, name="mlp_norm")(x)
        x = x + MLP(c, self.rules, name="mlp")(normed)
        return constrain(x, ("batch", "length", None), self.rules), past
