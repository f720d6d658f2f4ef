"""The decoder as functions of its parameters: `decoder(config)` gives a `Model`.

One architecture, many parameter sets: parameters are plain nested dicts that are passed in.
For training, the leaves of ``params["layers"]`` are stacked [L ...] and layers are scanned, so
compile time does not grow with depth. For decoding, they are a list with one tree per layer
and the loop is unrolled: a scan would copy or slice the whole cache in every step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from rlhf_jax.mesh import ShardingRules, constrain
from rlhf_jax.models.blocks import Block, RMSNorm, rope, write_columns
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import ScalarHead, has_bias, kernel_scale
from rlhf_jax.types import Array, Cache, ModelOutput, Params

# Logical axes of each leaf by its module and name; leaves of a stacked layer get "layers" first.
_AXES = {
    "embed/table": ("vocab", "embed"),
    "unembed/kernel": ("embed", "vocab"),
    "query/kernel": ("embed", "heads", "head_dim"),
    "query/bias": ("heads", "head_dim"),
    "query/lora_a": ("embed", "rank"),
    "query/lora_b": ("rank", "heads", "head_dim"),
    "output/kernel": ("heads", "head_dim", "embed"),
    "output/lora_a": ("heads", "head_dim", "rank"),
    "output/lora_b": ("rank", "embed"),
    "gate/kernel": ("embed", "mlp"),
    "gate/lora_a": ("embed", "rank"),
    "gate/lora_b": ("rank", "mlp"),
    "down/kernel": ("mlp", "embed"),
    "down/lora_a": ("mlp", "rank"),
    "down/lora_b": ("rank", "embed"),
    "attention_norm/scale": ("embed",),
    "mlp_norm/scale": ("embed",),
    "final_norm/scale": ("embed",),
    "query_norm/scale": ("head_dim",),
    "key_norm/scale": ("head_dim",),
}


def _axis_names(module: str, leaf: str) -> tuple[str, ...]:
    """The logical axes of one leaf; key and value are like query, up is like gate."""
    if module in ("key", "value"):
        names = _AXES[f"query/{leaf}"]
        return tuple("kv_heads" if name == "heads" else name for name in names)
    return _AXES[f"{'gate' if module == 'up' else module}/{leaf}"]


class Model(NamedTuple):
    """A decoder as functions of its parameters.

    init(key) -> params
    axes() -> the same tree with tuples of logical axis names (see mesh.ShardingRules)
    apply(params, tokens[B S], positions[B S], mask[B S], cache or None) -> ModelOutput
    logits(params, hidden[... D]) -> float32 [... V]
    scores(params, hidden[... D]) -> {head: float32 [...]}
    init_cache(batch, length) -> empty Cache with `length` columns
    unstack(params) -> params whose "layers" is a list, one tree per layer: for decoding
    """

    config: ModelConfig
    rules: ShardingRules
    init: Callable[[Array], Params]
    axes: Callable[[], Any]
    apply: Callable[..., ModelOutput]
    logits: Callable[[Params, Array], Array]
    scores: Callable[[Params, Array], dict[str, Array]]
    init_cache: Callable[[int, int], Cache]
    unstack: Callable[[Params], Params]


def decoder(config: ModelConfig, rules: ShardingRules = ShardingRules()) -> Model:  # noqa: B008
    """The decoder of `config` as a `Model`.

    Example:
        >>> model = decoder(named_size("tiny"))
        >>> params = model.init(jax.random.key(0))
        >>> out = model.apply(params, tokens, positions, mask, None)
        >>> logits = model.logits(params, out.hidden)
    """
    block = Block(config, rules)
    norm = RMSNorm(config.norm_eps, config.param_dtype)
    heads = {
        name: ScalarHead(kernel_scale(name, config.width), has_bias(name), config.param_dtype)
        for name in config.score_heads
    }

    def init(key: Array) -> Params:
        return _init_params(config, block, norm, heads, key)

    def axes() -> Any:
        return _logical_axes(jax.eval_shape(init, jax.random.key(0)))

    def apply(
        params: Params,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        cache: Cache | None = None,
    ) -> ModelOutput:
        # Zero at padding, so that whatever lies there stays out of keys, values and gradients.
        x = params["embed"]["table"][tokens].astype(jnp.float32)
        x = constrain(jnp.where(mask[..., None], x, 0.0), ("batch", "length", None), rules)
        rotary = rope(positions, config.head_dim, config.rope_theta)
        if cache is None:
            x = _full_pass(block, config.remat, params["layers"], x, rotary, mask)
        else:
            x, cache = _cached_pass(block, params["layers"], x, rotary, mask, cache)
        hidden = norm.apply({"params": params["final_norm"]}, x)
        return ModelOutput(hidden=hidden, cache=cache)

    def logits(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return _logits(config, rules, params, hidden)

    def scores(params: Params, hidden: Float[Array, "*B D"]) -> dict[str, Float[Array, "*B"]]:
        return {n: h.apply({"params": params["heads"][n]}, hidden) for n, h in heads.items()}

    def init_cache(batch: int, length: int) -> Cache:
        shape = (batch, config.kv_heads, length, config.head_dim)
        empty = jnp.zeros(shape, config.compute_dtype)
        empty = constrain(empty, ("batch", "kv_heads", "length", "head_dim"), rules)
        return Cache(
            keys=(empty,) * config.layers,
            values=(empty,) * config.layers,
            mask=jnp.zeros((batch, length), bool),
            length=jnp.zeros((), jnp.int32),
        )

    return Model(config, rules, init, axes, apply, logits, scores, init_cache, unstack_layers)


def unstack_layers(params: Params) -> Params:
    """Params whose "layers" is a list with one tree per layer; no change if it is one."""
    stacked = params["layers"]
    if isinstance(stacked, list):
        return params
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]
    return {**params, "layers": layers}


def _init_params(config, block, norm, heads, key) -> Params:
    embed_key, layers_key, unembed_key, heads_key = jax.random.split(key, 4)
    dtype = jnp.dtype(config.param_dtype)
    row = jnp.zeros((1, 1, config.width))
    rotary = rope(jnp.zeros((1, 1), jnp.int32), config.head_dim, config.rope_theta)
    attend = jnp.ones((1, 1, 1), bool)
    # 1/√D: tied logits start with variance 1, and no layer's output drowns the token's own signal.
    normal = nn.initializers.normal(config.width**-0.5)
    table = normal(embed_key, (config.vocab_size, config.width), dtype)
    params = {
        "embed": {"table": table},
        "layers": jax.vmap(lambda k: block.init(k, row, rotary, attend)["params"])(
            jax.random.split(layers_key, config.layers)
        ),
        "final_norm": norm.init(layers_key, row)["params"],  # ones: the key is not used
    }
    if config.lm_head and not config.tie_embeddings:
        kernel = normal(unembed_key, (config.width, config.vocab_size), dtype)
        params["unembed"] = {"kernel": kernel}
    if heads:
        keys = jax.random.split(heads_key, len(heads))
        params["heads"] = {
            name: head.init(k, row)["params"]
            for k, (name, head) in zip(keys, heads.items(), strict=True)
        }
    return params


def _logical_axes(shapes: Params) -> Any:
    def names(path, leaf):
        keys = [entry.key for entry in path]
        if keys[0] == "heads":
            return ("embed",)[: len(leaf.shape)]
        found = _axis_names(*keys[-2:])
        return ("layers", *found) if keys[0] == "layers" else found

    return jax.tree_util.tree_map_with_path(names, shapes)


def _full_pass(block, remat, layers, x, rotary, mask):
    """All layers on whole rows: scanned where stacked, in a Python loop where a list."""
    length = mask.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    attend = mask[:, None, :] & causal[None]

    def step(x, layer):
        x, _ = block.apply({"params": layer}, x, rotary, attend)
        return x, None

    if remat != "none":
        policies = jax.checkpoint_policies
        policy = {
            "full": policies.nothing_saveable,
            "dots": policies.dots_with_no_batch_dims_saveable,
        }[remat]
        # Inside a scan the loop already keeps the recomputation apart.
        step = jax.checkpoint(step, policy=policy, prevent_cse=isinstance(layers, list))
    if isinstance(layers, list):
        for layer in layers:
            x, _ = step(x, layer)
        return x
    x, _ = jax.lax.scan(step, x, layers)
    return x


def _cached_pass(block, layers, x, rotary, mask, cache):
    """Layers one by one: writes the new columns of the cache and attends to all before."""
    if not isinstance(layers, list):
        raise ValueError("a cache needs params from model.unstack(params), made before the loop")
    size = mask.shape[1]
    columns = write_columns(cache.mask, mask, cache.length, axis=1)
    here = jnp.reshape(cache.length, (-1, 1)) + jnp.arange(size)[None]  # [B S], or [1 S]
    earlier = jnp.arange(columns.shape[1])[None, None] <= here[:, :, None]
    attend = columns[:, None, :] & earlier
    keys, values = [], []
    for layer, past in zip(layers, zip(cache.keys, cache.values, strict=True), strict=True):
        x, (new_keys, new_values) = block.apply(
            {"params": layer}, x, rotary, attend, past, cache.length
        )
        keys.append(new_keys)
        values.append(new_values)
    cache = Cache(keys=tuple(keys), values=tuple(values), mask=columns, length=cache.length + size)
    return x, cache


def _logits(config, rules, params, hidden):
    if not config.lm_head:
        raise ValueError("this model has no LM head (model.lm_head=False): it gives no logits")
    compute = jnp.dtype(config.compute_dtype)
    tied = config.tie_embeddings
    weight = params["embed"]["table"] if tied else params["unembed"]["kernel"]
    # Not `table.T`: whether a transpose is folded into the product depends on the program
    # around it, and the two forms round differently.
    axes = ((hidden.ndim - 1,), (1 if tied else 0,))
    out = jax.lax.dot_general(
        hidden.astype(compute),
        weight.astype(compute),
        (axes, ((), ())),
        preferred_element_type=jnp.float32,
    )
    middle = (None,) * (out.ndim - 2)
    return constrain(out, ("batch", *middle, "vocab"), rules) if out.ndim > 1 else out
