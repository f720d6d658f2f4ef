"""softmax(q·k) v, of rows that hold all their columns and of rows that read a prefix."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from rlhf_jax.types import Array

KeysValues = tuple[Float[Array, "B G C Dh"], Float[Array, "B G C Dh"]]
PrefixKeysValues = tuple[Float[Array, "N G P Dh"], Float[Array, "N G P Dh"]]

# The name of what a backward pass keeps of a layer with remat="products": projections and
# attention. All else is cheaper to compute again than to write, keep and read; scores and their
# softmax grow with the square of the length.
KEPT = "kept"

MOST_BLOCKS, LEAST_ROWS = 4, 64  # of `causal_attention`


def causal_attention(
    query: Float[Array, "B S G R Dh"],
    keys: Float[Array, "B G C Dh"],
    values: Float[Array, "B G C Dh"],
    attend: Bool[Array, "B S A"],
    *,
    blocks: int,
    prefix: PrefixKeysValues | None = None,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> Float[Array, "B S G R Dh"]:
    """`attention` of tokens that see themselves and those before, in blocks of queries.

    Queries are those of the last S of C columns. A block has no product with the columns behind
    it, which it does not see: of n blocks and as many columns as queries that is (n − 1)/2n of all
    products with own columns, and of the scores.

    Args:
        attend: false at all later columns.
        blocks: how many; see `blocks_of`.
    """
    size, before = query.shape[1], attend.shape[2] - keys.shape[2]
    earlier = keys.shape[2] - size
    options = dict(prefix=prefix, scale=scale, softcap=softcap)
    parts, rows = [], -(-size // blocks)
    for first in range(0, size, rows):
        end = min(first + rows, size)
        seen = attend[:, first:end, : before + earlier + end]
        own = (keys[:, :, : earlier + end], values[:, :, : earlier + end])
        parts.append(attention(query[:, first:end], *own, seen, **options))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def blocks_of(size: int) -> int:
    """How many blocks `causal_attention` makes of rows of `size` tokens: of about `LEAST_ROWS` or
    more, for which products were still as fast on CPUs; a program has a body for each."""
    return max(1, min(MOST_BLOCKS, size // LEAST_ROWS))


def attention(
    query: Float[Array, "B S G R Dh"],
    keys: Float[Array, "B G C Dh"],
    values: Float[Array, "B G C Dh"],
    attend: Bool[Array, "B S A"],
    *,
    prefix: PrefixKeysValues | None = None,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> Float[Array, "B S G R Dh"]:
    """softmax(q·k · scale) v over the columns where `attend` is true; scores in float32.

    Args:
        attend: A = C columns, or P + C with those of a prefix first.
        prefix: keys and values before these. All B/N rows of a group read one row of it: it is
            contracted with all their queries in one product, and never repeated.
        scale: 0 takes 1/√Dh.
        softcap: c in c·tanh(scores / c), before the softmax; 0 = none.

    A row that may attend to nothing (a padded query) gets the plain mean of the values: its
    result is finite and nobody reads it.
    """
    scores = _scores(query, keys)
    if prefix is not None:
        scores = jnp.concatenate([_prefix_scores(query, prefix[0]), scores], axis=-1)
    scores = capped(scores * (scale or query.shape[-1] ** -0.5), softcap)
    scores = jnp.where(attend[:, None, None], scores, -1e30)
    # Divided after the product, whose result is smaller than the weights. Their gradient then asks
    # for one sum over Dh and for none over C (Dao et al. 2022, https://arxiv.org/abs/2205.14135,
    # appendix B.2).
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = jnp.moveaxis(jnp.sum(weights, axis=-1), 3, 1)[..., None]  # [B S G R 1]
    weights = weights.astype(values.dtype)
    if prefix is None:
        mixed = _mix(weights, values)
    else:
        before, own = jnp.split(weights, [prefix[1].shape[2]], axis=-1)
        mixed = _prefix_mix(before, prefix[1]) + _mix(own, values)
    return (checkpoint_name(mixed, KEPT) / total).astype(values.dtype)


def _scores(
    query: Float[Array, "B S G R Dh"], keys: Float[Array, "B G C Dh"]
) -> Float[Array, "B G R S C"]:
    """q·k in float32. Queries are transposed, not scores, of which there are more, and their rows
    have one axis: XLA on CPUs takes products as they are written."""
    rows, size, groups, each, width = query.shape
    flat = jnp.transpose(query, (0, 2, 3, 1, 4)).reshape(rows, groups, each * size, width)
    scores = jnp.einsum("bgtd,bgcd->bgtc", flat, keys, preferred_element_type=jnp.float32)
    return scores.reshape(rows, groups, each, size, -1)


def _mix(
    weights: Float[Array, "B G R S C"], values: Float[Array, "B G C Dh"]
) -> Float[Array, "B S G R Dh"]:
    """Weighted sums in float32, with one axis of rows as in `_scores`: with two, XLA on CPUs has no
    product of bfloat16. Of few rows, as in decoding, the product is half as fast again as it stands
    there; of many rows its transpose is."""
    rows, groups, each, size, columns = weights.shape
    flat = weights.reshape(rows, groups, each * size, columns)
    if size == 1:
        mixed = jnp.einsum("bgtc,bgcd->bgtd", flat, values, preferred_element_type=jnp.float32)
        return mixed.reshape(rows, 1, groups, each, -1)
    mixed = jnp.einsum("bgcd,bgtc->bgdt", values, flat, preferred_element_type=jnp.float32)
    return jnp.transpose(mixed.reshape(rows, groups, -1, each, size), (0, 4, 1, 3, 2))


def _prefix_scores(
    query: Float[Array, "B S G R Dh"], keys: Float[Array, "N G P Dh"]
) -> Float[Array, "B G R S P"]:
    """q·k in float32, where row n of the keys is that of rows n*K ... n*K+K-1 of the queries."""
    grouped = query.reshape(keys.shape[0], -1, *query.shape[1:])
    scores = jnp.einsum("nksgrd,ngpd->nkgrsp", grouped, keys, preferred_element_type=jnp.float32)
    return scores.reshape(-1, *scores.shape[2:])


def _prefix_mix(
    weights: Float[Array, "B G R S P"], values: Float[Array, "N G P Dh"]
) -> Float[Array, "B S G R Dh"]:
    """Weighted sums in float32 of the values that the rows of a group have in common."""
    if weights.shape[3] == 1:
        return _prefix_mix_of_tokens(weights, values)
    grouped = weights.reshape(values.shape[0], -1, *weights.shape[1:])
    mixed = jnp.einsum("nkgrsp,ngpd->nksgrd", grouped, values, preferred_element_type=jnp.float32)
    return mixed.reshape(-1, *mixed.shape[2:])


def _prefix_mix_of_tokens(weights, values):
    """`_prefix_mix` for one token a row, as in decoding: the rows of a group in one axis."""
    prompts, groups, columns, _ = values.shape
    each = weights.shape[2]
    flat = jnp.moveaxis(weights.reshape(prompts, -1, groups, each, columns), 2, 1)  # [N G K R P]
    flat = flat.reshape(prompts, groups, -1, columns)
    mixed = jnp.einsum("ngtp,ngpd->ngtd", flat, values, preferred_element_type=jnp.float32)
    mixed = jnp.moveaxis(mixed.reshape(prompts, groups, -1, each, mixed.shape[-1]), 1, 2)
    return mixed.reshape(-1, 1, groups, each, mixed.shape[-1])


def capped(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """c·tanh(x / c), within ±c (Gemma 2, https://arxiv.org/abs/2408.00118); x where c is 0."""
    return cap * jnp.tanh(x / cap) if cap else x
