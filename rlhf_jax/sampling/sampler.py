"""Sampling completions in one compiled program: prefill each prompt once, then a decode loop.

The prompt's keys and values stay as the prefill left them, once for all K samples: the loop reads
them and writes only the columns that each sample has of its own.

The loop is a `while_loop` that ends when every row has ended. On a mesh it runs under
`shard_map`, manual over the batch axes: each shard of rows is a loop of its own that stops when
its own rows have ended, and the only collectives in it are those of tensor parallelism.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int, Key

from rlhf_jax.mesh import batch_axes
from rlhf_jax.models.completions import positions_of
from rlhf_jax.models.lora import join
from rlhf_jax.models.transformer import Model
from rlhf_jax.models.turned import turn, turns
from rlhf_jax.sampling.methods import Keys, draw_token, row_keys
from rlhf_jax.text.steps import mark_step_ends
from rlhf_jax.types import (
    Array,
    Cache,
    Params,
    Prefix,
    Prompts,
    Rollouts,
    Sampling,
    TokenTables,
)

# Leaves that the model casts to its compute type at each use; all others it uses as they are.
_CAST = ("kernel", "lora_a", "lora_b")


class Decoding(NamedTuple):
    """State of the decode loop. `position` tokens of each row are drawn, `token` is the last."""

    position: Int[Array, ""]
    alive: Bool[Array, " B"]  # no end-of-text token yet
    token: Int[Array, " B"]
    cache: Cache
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    behaviour: Float[Array, "B T"]


def decoding_params(model: Model, params: Params, frozen: Params) -> tuple[Params, Params]:
    """Weights as a decode loop wants them: (for `model.apply`, for `model.logits`).

    One tree per layer, and every matrix in the compute type, so that no step slices or casts
    again. The arithmetic stays that of the trainer: embeddings are looked up, and norms and
    biases applied, in the stored type; only a tied table is cast for the logits.
    """
    compute = jnp.dtype(model.config.compute_dtype)
    tree = join(params, frozen)
    tree = {name: leaves for name, leaves in tree.items() if name != "heads"}

    def cast(path, leaf):
        return leaf.astype(compute) if path[-1].key in _CAST else leaf

    weights = model.unstack(jax.tree_util.tree_map_with_path(cast, tree))
    table = weights["embed"]["table"]
    return weights, {**weights, "embed": {"table": table.astype(compute)}}


def continued_cache(model: Model, cache: Cache, samples: int, columns: int) -> Cache:
    """`columns` empty columns for `samples` rows of each row of a full cache (groups contiguous),
    which becomes their prefix as it is."""
    prefix = Prefix(keys=cache.keys, values=cache.values, mask=cache.mask)
    own = model.init_cache(cache.mask.shape[0] * samples, columns)
    return dataclasses.replace(own, prefix=prefix)


def _write_token(
    state: Decoding,
    logits: Float[Array, "B V"],
    keys: Keys,
    sampling: Sampling,
    tables: TokenTables,
) -> Decoding:
    """Draws the token at `state.position` and writes it where the row is alive, else a pad."""
    alive = state.alive
    token, logprobs, behaviour = draw_token(logits, keys, state.position, sampling)
    token = jnp.where(alive, token, tables.pad.astype(jnp.int32))

    def put(columns, values):
        at = (0, state.position)
        return jax.lax.dynamic_update_slice(columns, values[:, None].astype(columns.dtype), at)

    return state._replace(
        position=state.position + 1,
        alive=alive & ~tables.ends_text[token],
        token=token,
        tokens=put(state.tokens, token),
        mask=put(state.mask, alive),
        logprobs=put(state.logprobs, jnp.where(alive, logprobs, 0.0)),
        behaviour=put(state.behaviour, jnp.where(alive, behaviour, 0.0)),
    )


def _decode(
    model: Model,
    params: Params,
    frozen: Params,
    prompts: Prompts,
    keys: Keys,
    sampling: Sampling,
    tables: TokenTables,
    *,
    samples: int,
    max_tokens: int,
    mesh: Mesh | None,
) -> Decoding:
    """Prefill and decode loop of the rows at hand; the final state."""
    weights, head = decoding_params(model, params, frozen)
    rows, width = prompts.tokens.shape
    counts = jnp.sum(prompts.mask, axis=-1).astype(jnp.int32)
    positions = positions_of(prompts.mask)
    given = (prompts.tokens, positions, prompts.mask, model.init_cache(rows, width))
    out = model.apply(weights, *given, since=width - 1)
    logits = jnp.repeat(model.logits(head, out.hidden[:, -1]), samples, axis=0)  # [B V]
    counts = jnp.repeat(counts, samples, axis=0)
    shape = (rows * samples, max_tokens)
    # The last token drawn is never read, so it gets no column. A loop that never runs is compiled
    # too, and wants one.
    columns = max(max_tokens - 1, 1)
    state = Decoding(
        position=jnp.zeros((), jnp.int32),
        alive=jnp.ones(shape[:1], bool),
        token=jnp.zeros(shape[:1], jnp.int32),
        cache=continued_cache(model, out.cache, samples, columns),
        tokens=jnp.full(shape, tables.pad, jnp.int32),
        mask=jnp.zeros(shape, bool),
        logprobs=jnp.zeros(shape, jnp.float32),
        behaviour=jnp.zeros(shape, jnp.float32),
    )

    loop_weights, loop_head = weights, head
    if turns(model.config, mesh, *shape):
        loop_weights, loop_head = turn(weights, head, model.config)

    def unfinished(state):
        return (state.position < max_tokens) & jnp.any(state.alive)

    def step(state):
        # Rows that have ended are computed along, but masked out of their own cache.
        place = (counts + state.position - 1)[:, None]
        given = (state.token[:, None], place, state.alive[:, None], state.cache)
        out = model.apply(loop_weights, *given)
        logits = model.logits(loop_head, out.hidden[:, 0])
        return _write_token(state._replace(cache=out.cache), logits, keys, sampling, tables)

    state = _write_token(state, logits, keys, sampling, tables)
    return jax.lax.while_loop(unfinished, step, state)


def _generate_rows(
    model: Model,
    samples: int,
    max_tokens: int,
    mesh: Mesh | None,
    params: Params,
    frozen: Params,
    prompts: Prompts,
    key: Key[jax.Array, ""],
    sampling: Sampling,
    tables: TokenTables,
    version: Int[Array, ""],
) -> Rollouts:
    """`generate` for the rows of one shard."""
    tables = jax.tree.map(jnp.asarray, tables)
    rows = prompts.tokens.shape[0]
    sample = jnp.tile(jnp.arange(samples, dtype=jnp.int32), rows)
    counters = (
        jnp.repeat(jnp.asarray(counter), samples, axis=0)
        for counter in (prompts.source, prompts.record, prompts.draw)
    )
    state = _decode(
        model,
        params,
        frozen,
        prompts,
        row_keys(key, *counters, sample),
        sampling,
        tables,
        samples=samples,
        max_tokens=max_tokens,
        mesh=mesh,
    )
    return Rollouts(
        prompts=prompts,
        tokens=state.tokens,
        mask=state.mask,
        step_ends=mark_step_ends(state.tokens, state.mask, tables),
        logprobs=state.logprobs,
        behaviour_logprobs=state.behaviour,
        truncated=state.alive,
        sample=sample,
        version=jnp.full(sample.shape, version, jnp.int32),
    )


def generate(
    model: Model,
    params: Params,
    frozen: Params,
    prompts: Prompts,
    key: Key[jax.Array, ""],
    *,
    samples: int,
    sampling: Sampling,
    max_tokens: int,
    tables: TokenTables,
    version: Int[Array, ""] | int,
    mesh: Mesh | None = None,
) -> Rollouts:
    """Samples K completions of each prompt; pure, to be jitted by the caller.

    Noise comes from counters (key, source, record, draw, sample, position), so it is the same
    whatever else is in the batch. Rows end with an end-of-text token, which is part of tokens
    and mask, or at `max_tokens`, and then are `truncated`. Only `samples`, `max_tokens` and
    whether anything truncates the distribution are compiled in.

    Args:
        params: trainable leaves, or a whole tree.
        frozen: the other leaves (base of adapters); {} if there are none.
        prompts: N rows; must divide over the batch shards of `mesh`.
        key: holds (seed, purpose, step).
        samples: K, completions per prompt.
        sampling: temperature and truncation, traced; see `make_sampling`.
        max_tokens: T.
        tables: what ids mean, traced.
        version: policy step, written on every row.
        mesh: where the rows lie; with several batch shards each runs its own loop.
    """
    if not isinstance(prompts, Prompts):
        raise TypeError(
            f"prompts is a {type(prompts).__name__}; wanted types.Prompts, such as the batches of "
            "data.prompts.PromptSource"
        )
    if samples < 1 or max_tokens < 1:
        raise ValueError(f"samples={samples}, max_tokens={max_tokens}; wanted 1 or more of both")
    run = functools.partial(_generate_rows, model, samples, max_tokens, mesh)
    arguments = (params, frozen, prompts, key, sampling, tables, jnp.asarray(version, jnp.int32))
    axes = () if mesh is None else batch_axes(mesh, model.rules)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if shards == 1:
        return run(*arguments)
    rows = prompts.tokens.shape[0]
    if rows % shards:
        raise ValueError(f"{rows} prompts do not divide over {shards} shards of the batch")
    split, whole = PartitionSpec(axes), PartitionSpec()
    # Whole weights on every shard: gathered once here, not in every step of the loop.
    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(whole, whole, split, whole, whole, whole, whole),
        out_specs=split,
        axis_names=set(axes),
        check_vma=False,
    )
    return sharded(*arguments)
