"""The decoder as functions of its parameters: `decoder(config)` gives a `Model`.

One architecture, many parameter sets: parameters are plain nested dicts that are passed in.
For training, the leaves of ``params["layers"]`` are stacked [L ...] and layers are scanned, so
compile time does not grow with depth. For decoding, they are a list with one tree per layer
and the loop is unrolled: a scan would copy or slice the whole cache in every step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from rlhf_jax.mesh import ShardingRules, constrain
from rlhf_jax.models.attention import capped
from rlhf_jax.models.blocks import Block, norm_of
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import ScalarHead, has_bias, kernel_scale
from rlhf_jax.models.members import stacked_axes, stacked_init
from rlhf_jax.models.passes import Layout, cached_pass, check_positions, full_pass, sights
from rlhf_jax.models.turned import TURNED, few_rows
from rlhf_jax.types import Array, Cache, ModelOutput, Params

_ROWS = ("batch", "length", None)
# Logical axes of each leaf by its module and name; leaves of a stacked layer get "layers" first.
_AXES = {
    "embed/table": ("vocab", "embed"),
    "positions/table": ("length", "embed"),
    "unembed/kernel": ("embed", "vocab"),
    "query/kernel": ("embed", "heads", "head_dim"),
    "query/bias": ("heads", "head_dim"),
    "query/lora_a": ("embed", "rank"),
    "query/lora_b": ("rank", "heads", "head_dim"),
    "output/bias": ("embed",),
    "output/kernel": ("heads", "head_dim", "embed"),
    "output/lora_a": ("heads", "head_dim", "rank"),
    "output/lora_b": ("rank", "embed"),
    "gate/bias": ("mlp",),
    "gate/kernel": ("embed", "mlp"),
    "gate/lora_a": ("embed", "rank"),
    "gate/lora_b": ("rank", "mlp"),
    "down/bias": ("embed",),
    "down/kernel": ("mlp", "embed"),
    "down/lora_a": ("mlp", "rank"),
    "down/lora_b": ("rank", "embed"),
}


def _axis_names(module: str, leaf: str) -> tuple[str | None, ...]:
    """The logical axes of one leaf; key and value are like query, up is like gate."""
    if module.endswith("_norm"):
        return ("head_dim",) if module in ("query_norm", "key_norm") else ("embed",)
    if module in ("key", "value"):
        names = _AXES[f"query/{leaf}"]
        return tuple("kv_heads" if name == "heads" else name for name in names)
    return _AXES[f"{'gate' if module == 'up' else module}/{leaf}"]


class Model(NamedTuple):
    """A decoder as functions of its parameters.

    Of an ensemble, `init` and `axes` give the tree of all members (see `rlhf_jax.models.members`),
    and the other functions take the tree of one member (`each_member`).

    init(key) -> params
    shapes() -> the same tree of shapes and types; touches no device
    axes() -> the same tree with tuples of logical axis names (see mesh.ShardingRules)
    apply(params, tokens[B S], positions[B S], mask[B S], cache or None) -> ModelOutput
        `layout=` says that rows hold whole groups (`rlhf_jax.models.passes.Layout`; without a
        cache), `since=` which column is the first that is wanted: hidden is [B S-since D]
    logits(params, hidden[... D]) -> float32 [... V]
    scores(params, hidden[... D]) -> {head: float32 [...]}
    init_cache(batch, length) -> empty Cache with `length` columns
    unstack(params) -> params whose "layers" is a list, one tree per layer: for decoding
    """

    config: ModelConfig
    rules: ShardingRules
    init: Callable[[Array], Params]
    shapes: Callable[[], Any]
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
    norm = norm_of(config)
    heads = {
        name: ScalarHead(kernel_scale(name, config.width), has_bias(name), config.param_dtype)
        for name in config.score_heads
    }

    def init_one(key: Array) -> Params:
        return _init_params(config, block, norm, heads, key)

    init = stacked_init(init_one, config)

    def axes() -> Any:
        one = _logical_axes(jax.eval_shape(lambda: init_one(jax.random.key(0))))
        return stacked_axes(one, config)

    def shapes() -> Any:
        # The key is made inside: outside it would be an array on a device.
        return jax.eval_shape(lambda: init(jax.random.key(0)))

    def apply(
        params: Params,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        cache: Cache | None = None,
        layout: Layout | None = None,
        since: int = 0,
    ) -> ModelOutput:
        x = constrain(_embed(config, params, tokens, positions, mask), _ROWS, rules)
        if cache is None:
            x = full_pass(config, block, params["layers"], x, positions, mask, layout, since)
        else:
            assert layout is None, "a cache holds rows with a prefix, not groups"
            given = (params["layers"], x, positions, mask, cache, since)
            x, cache = cached_pass(config, block, *given)
        return ModelOutput(hidden=norm.apply({"params": params["final_norm"]}, x), cache=cache)

    logits = functools.partial(_logits, config, rules)

    def scores(params: Params, hidden: Float[Array, "*B D"]) -> dict[str, Float[Array, "*B"]]:
        return {n: h.apply({"params": params["heads"][n]}, hidden) for n, h in heads.items()}

    init_cache = functools.partial(_init_cache, config, rules)
    return Model(
        config, rules, init, shapes, axes, apply, logits, scores, init_cache, unstack_layers
    )


def _init_cache(config: ModelConfig, rules: ShardingRules, batch: int, length: int) -> Cache:
    check_positions(config, length)
    shape = (batch, config.kv_heads, length, config.head_dim)
    empty = jnp.zeros(shape, config.compute_dtype)
    empty = constrain(empty, ("batch", "kv_heads", "length", "head_dim"), rules)
    return Cache(
        keys=(empty,) * config.layers,
        values=(empty,) * config.layers,
        mask=jnp.zeros((batch, length), bool),
        length=jnp.zeros((), jnp.int32),
    )


def _embed(config, params, tokens, positions, mask):
    """[B S D] in float32; zero at padding, so that whatever lies there stays out of keys, values
    and gradients."""
    x = params["embed"]["table"][tokens].astype(jnp.float32)
    if config.embed_scale != 1:
        # Rounded as published models round it.
        x = x * jnp.asarray(config.embed_scale, config.compute_dtype).astype(jnp.float32)
    if config.positions == "learned":
        x = x + params["positions"]["table"][positions].astype(jnp.float32)
    return jnp.where(mask[..., None], x, 0.0)


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
    first = jnp.zeros((1, 1), jnp.int32)
    sight = sights(config, first, first, jnp.ones((1, 1, 1), bool))[config.local[0]]
    # 1/√D: tied logits start with variance 1, and no layer's output drowns the token's own signal.
    normal = nn.initializers.normal(config.width**-0.5)
    table = normal(embed_key, (config.vocab_size, config.width), dtype)
    params = {
        "embed": {"table": table},
        "layers": jax.vmap(lambda k: block.init(k, row, sight)["params"])(
            jax.random.split(layers_key, config.layers)
        ),
        "final_norm": norm.init(layers_key, row)["params"],  # ones: the key is not used
    }
    if config.lm_head and not config.tie_embeddings:
        kernel = normal(unembed_key, (config.width, config.vocab_size), dtype)
        params["unembed"] = {"kernel": kernel}
    if config.positions == "learned":
        table = normal(
            jax.random.fold_in(embed_key, 1), (config.max_positions, config.width), dtype
        )
        params["positions"] = {"table": table}
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


def _logits(
    config: ModelConfig, rules: ShardingRules, params: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    if not config.lm_head:
        raise ValueError("this model has no LM head (model.lm_head=False): it gives no logits")
    if TURNED in params.get("unembed", {}):
        return capped(few_rows(hidden, params["unembed"][TURNED]), config.logit_softcap)
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
    out = capped(out, config.logit_softcap)
    return constrain(out, ("batch", *middle, "vocab"), rules) if out.ndim > 1 else out
