"""How rows go through the layers: all at once for training, or with a cache for decoding."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from rlhf_jax.models.attention import KEPT
from rlhf_jax.models.blocks import Block, GroupSight, Past, Sight, write_columns
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.rope import rope
from rlhf_jax.types import Array, Cache

# See `_last_is_apart`. On a CPU (8 layers of width 512) a gradient is 5 % cheaper from 144 unread
# tokens per copied layer on, and a forward pass costs the same at 288. In deep models the last
# layer is a small part, for much memory.
LEAST_UNREAD, MOST_LAYERS = 256, 12

Columns = Int[Array, "B S"] | Int[Array, "1 S"]


class Layout(NamedTuple):
    """How a row holds a whole group: its prompt, left-padded, and behind it, one after the other,
    its samples, right-padded. The samples do not see each other.

    prompt: columns of the prompt, P.
    samples: how many of it there are, K; all other columns are theirs.
    """

    prompt: int
    samples: int


def sights(
    config: ModelConfig,
    positions: Int[Array, "B S"],
    columns: Columns,
    attend: Bool[Array, "B S A"],
) -> tuple[Sight | None, Sight | None]:
    """What layers without and layers with a window look at; None for a kind that no layer is of.

    Args:
        columns: where each token lies. The window counts columns, which is the same as counting
            tokens: no padding lies between the tokens of a row.
        attend: what is there to be seen without a window.
    """
    rotary = config.positions == "rope"
    full = near = None
    if not all(config.local):
        full = Sight(rope(positions, config) if rotary else None, attend)
    if any(config.local):
        first = columns - config.window + 1
        inside = jnp.arange(attend.shape[2])[None, None] >= first[:, :, None]
        angles = rope(positions, config, local=True) if rotary else None
        near = Sight(angles, attend & inside)
    return full, near


def full_pass(
    config: ModelConfig,
    block: Block,
    layers: Any,
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    layout: Layout | None = None,
    since: int = 0,
) -> Float[Array, "B S-{since} D"]:
    """All layers on whole rows: scanned where stacked, in a Python loop where a list.

    Args:
        since: the first column that is read; what comes back starts there.
        layout: where rows hold whole groups. Prompts then are read once for all their samples, and
            the numbers and gradients are those of rows in which each sample stands behind a prompt
            of its own (Prefix Grouper: Liu et al. 2025, https://arxiv.org/abs/2506.05433).
    """
    if layout is None:
        both = _own_sights(config, positions, mask)
    else:
        both = _group_sights(config, positions, mask, layout)

    step = _make_step(config, block, both, chunks_of(config, *mask.shape))
    local = jnp.array(config.local)
    if isinstance(layers, list):
        for layer, kind, first in zip(layers, local, _in_last(since, config), strict=True):
            x, _ = step(x, (layer, kind), since=first)
        return x
    # Inside a scan the loop already keeps the recomputation apart.
    scanned = functools.partial(step, prevent_cse=False)
    if not _last_is_apart(config, block, mask.shape[0] * since):
        x, _ = jax.lax.scan(scanned, x, (layers, local))
        return x[:, since:]
    most, last = (_cut((layers, local), at) for at in (slice(-1), -1))
    x, _ = jax.lax.scan(scanned, x, most)
    x, _ = step(x, last, since=since)
    return x


def _make_step(config, block, both, chunks):
    """One layer as a function (x, (layer, kind)) -> (x, None) that keeps for its backward pass
    what ``config.remat`` says; in chunks of rows, one after the other, where there are several."""

    def step(x, layer_and_kind, *, since=0, prevent_cse=True):
        layer, local = layer_and_kind
        if chunks > 1:  # gradients of the layer are added up over chunks, in this type
            layer = jax.tree.map(_wide, layer)

        def run(x, both):
            return block.apply({"params": layer}, x, _choose(both, local), None, since)[0]

        run = _remat(config, run, prevent_cse and chunks == 1)
        if chunks == 1:
            return run(x, both), None
        parts = jax.tree.map(lambda leaf: _cut_rows(leaf, chunks), (x, both))
        out = jax.lax.map(lambda part: run(*part), parts)
        return out.reshape(x.shape[0], *out.shape[2:]), None

    return step


def chunks_of(config: ModelConfig, rows: int, length: int) -> int:
    """In how many chunks of whole rows a layer is computed (``config.layer_chunk``): as few equal
    ones as keep to that many tokens; single rows where these are longer.

    One where all such chunks are small (rows without a good divisor), on other devices than CPUs,
    and on a mesh of several devices, over which the rows are spread.
    """
    most, mesh = config.layer_chunk, jax.sharding.get_abstract_mesh()
    several = not mesh.empty and mesh.size > 1
    if not most or rows == 0 or several or jax.default_backend() != "cpu":
        return 1
    fitting = (n for n in range(1, rows) if rows % n == 0 and rows // n * length <= most)
    chunks = next(fitting, rows)
    return chunks if 4 * (rows // chunks * length) >= most else 1


def _cut_rows(leaf, chunks):
    return leaf.reshape(chunks, leaf.shape[0] // chunks, *leaf.shape[1:])


def _wide(leaf):
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _in_last(since, config):
    """`since` of each layer: columns of all but the last are read by the next one."""
    return (0,) * (config.layers - 1) + (since,)


def _cut(stacked, at):
    return jax.tree.map(lambda x: x[at], stacked)


def _last_is_apart(config, block, unread):
    """Whether the last of stacked layers runs behind the loop over the others, and so makes keys
    and values alone of `unread` tokens that nobody reads.

    It costs a copy of the others' parameters, since a loop wants them in one piece. Not where the
    length lies on several devices: columns from some on would lie on some of them.
    """
    worth = unread >= LEAST_UNREAD * (config.layers - 1)
    return unread > 0 and worth and config.layers <= MOST_LAYERS and block.rules.length is None


def _remat(config, step, prevent_cse):
    """`step` that keeps for the backward pass what ``config.remat`` says."""
    if config.remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = {
        "products": policies.save_only_these_names(KEPT),
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
    }[config.remat]
    return jax.checkpoint(step, policy=policy, prevent_cse=prevent_cse)


def _own_sights(config, positions, mask):
    """`sights` of whole rows, whose tokens see themselves and those before."""
    length = mask.shape[1]
    check_positions(config, length)
    seen = mask[:, None, :] & _causal(length)
    return sights(config, positions, jnp.arange(length)[None], seen)


def _group_sights(config, positions, mask, layout):
    """`sights` of rows that hold groups, as `GroupSight`s."""
    start, samples = layout
    rows, size = mask.shape[0] * samples, (mask.shape[1] - start) // samples
    if start + samples * size != mask.shape[1]:
        raise ValueError(
            f"rows of {mask.shape[1]} columns; wanted {start} of a prompt and a multiple of "
            f"{samples}, its samples"
        )
    check_positions(config, start + size)
    prompts = _own_sights(config, positions[:, :start], mask[:, :start])
    seen = mask[:, start:].reshape(rows, size)[:, None, :] & _causal(size)
    seen = jnp.concatenate([_prefix_attend(mask[:, :start], rows, size), seen], axis=2)
    # In a row of its own, a sample's first column comes after those of the prompt.
    columns = start + jnp.arange(size)[None]
    own = sights(config, positions[:, start:].reshape(rows, size), columns, seen)
    pairs = zip(prompts, own, strict=True)
    return tuple(None if one is None else GroupSight(one, other) for one, other in pairs)


def _causal(length: int) -> Bool[Array, "1 S S"]:
    return jnp.tril(jnp.ones((length, length), bool))[None]


def _choose(both, local: Bool[Array, ""]) -> Sight | GroupSight:
    """The sight of one layer; where all layers are of one kind there is nothing to select."""
    full, near = both
    if full is None or near is None:
        return near if full is None else full
    return jax.tree.map(lambda a, b: jnp.where(local, b, a), full, near)


def cached_pass(
    config: ModelConfig,
    block: Block,
    layers: Any,
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    cache: Cache,
    since: int = 0,
) -> tuple[Float[Array, "B S-{since} D"], Cache]:
    """Layers one by one: writes the new columns of the cache and attends to all before, those of
    its prefix included.

    Args:
        since: as in `full_pass`.
    """
    if not isinstance(layers, list):
        raise ValueError("a cache needs params from model.unstack(params), made before the loop")
    size, prefix = mask.shape[1], cache.prefix
    columns = write_columns(cache.mask, mask, cache.length, axis=1)
    here = jnp.reshape(cache.length, (-1, 1)) + jnp.arange(size)[None]  # [B S], or [1 S]
    earlier = jnp.arange(columns.shape[1])[None, None] <= here[:, :, None]
    attend = columns[:, None, :] & earlier
    shared = [None] * config.layers
    if prefix is not None:
        attend = jnp.concatenate([_prefix_attend(prefix.mask, *attend.shape[:2]), attend], axis=2)
        here = here + prefix.mask.shape[1]
        shared = zip(prefix.keys, prefix.values, strict=True)
    both = sights(config, positions, here, attend)
    written = []
    own = zip(cache.keys, cache.values, strict=True)
    by_layer = (config.local, own, shared, _in_last(since, config))
    for layer, local, pair, before, first in zip(layers, *by_layer, strict=True):
        past = Past(pair, cache.length, before)
        x, pair = block.apply({"params": layer}, x, both[local], past, first)
        written.append(pair)
    keys, values = zip(*written, strict=True)
    length = cache.length + size
    return x, Cache(keys=keys, values=values, mask=columns, length=length, prefix=prefix)


def _prefix_attend(mask: Bool[Array, "N P"], rows: int, size: int) -> Bool[Array, "B S P"]:
    """Which columns of a prefix each new token may see: all that hold a token."""
    groups, width = mask.shape
    if rows % groups:
        raise ValueError(
            f"a cache of {rows} rows has a prefix of {groups}; wanted a divisor of {rows}: one row "
            "for each group"
        )
    mask = jnp.repeat(mask, rows // groups, axis=0)
    return jnp.broadcast_to(mask[:, None], (rows, size, width))


def check_positions(config: ModelConfig, length: int) -> None:
    """Raises a ValueError for rows longer than the table of learned positions."""
    if length > longest_row(config):
        raise ValueError(
            f"rows of {length} tokens, but the model has learned {config.max_positions} positions "
            "(model.max_positions); shorten prompts or completions"
        )


def longest_row(config: ModelConfig) -> float | int:
    """How many tokens of a row the model has positions for; inf where they are not learned."""
    return config.max_positions if config.positions == "learned" else math.inf
