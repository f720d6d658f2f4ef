"""A prefix that rows of a group share: the numbers of a cache in which every row has its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import attention
from rlhf_jax.types import Cache, Prefix
from tests.models.batches import plain, tiny

N, K, P = 2, 3, 6
# Options of the model, and whether each row has a length of its own. Windows are shorter than the
# prefix: its first columns go out of sight.
CASES = {
    "full": (dict(), False),
    "full, a length per row": (dict(attention_scale=0.2), True),
    "window": (dict(window=4, positions="learned", max_positions=32), False),
    "both, a length per row": (
        dict(window=4, local_layers=(True, False), attention_softcap=3.0),
        True,
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, positions, mask, cache):
    out = model.apply(params, tokens, positions, mask, cache)
    return out.hidden, out.cache


def prefilled(model, params):
    """The full cache of N left-padded prefixes, and how many tokens each has."""
    tokens, _, mask = plain(N, P)
    mask = mask.at[0, :2].set(False)
    counts = jnp.sum(mask, axis=1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return apply(model, params, tokens, positions, mask, model.init_cache(N, P))[1], counts


def repeated(cache: Cache, columns: int) -> Cache:
    """Every row K times, with room for more columns: the cache without a prefix."""

    def expand(x, axis):
        room = [(0, columns if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(jnp.repeat(x, K, axis=0), room)

    return Cache(
        keys=tuple(expand(x, 2) for x in cache.keys),
        values=tuple(expand(x, 2) for x in cache.values),
        mask=expand(cache.mask, 1),
        length=cache.length,
    )


def shared(model, cache: Cache, columns: int) -> Cache:
    """The same columns once, as a prefix."""
    prefix = Prefix(keys=cache.keys, values=cache.values, mask=cache.mask)
    return dataclasses.replace(model.init_cache(N * K, columns), prefix=prefix)


@pytest.mark.parametrize(("options", "per_row"), CASES.values(), ids=CASES)
def test_rows_with_a_prefix_equal_rows_that_hold_it(options, per_row):
    model, stacked = tiny(**options)
    params, rows = model.unstack(stacked), N * K
    cache, counts = prefilled(model, params)
    here, alone = shared(model, cache, 7), repeated(cache, 7)
    if per_row:
        zero = jnp.zeros(rows, jnp.int32)
        here = dataclasses.replace(here, length=zero)
        alone = dataclasses.replace(alone, length=zero + P)
    tokens = np.random.default_rng(3).integers(0, 260, (rows, 7))
    position = jnp.repeat(counts, K)
    for first, size in ((0, 3), (3, 1), (4, 1)):  # several columns at once, then one by one
        step = jnp.asarray(tokens[:, first : first + size])
        mask = jnp.ones(step.shape, bool)
        if per_row and size == 1:
            # Some rows stay behind, so that the next column of each is another.
            behind = jnp.arange(rows) % 2
            here = dataclasses.replace(here, length=here.length - behind)
            alone = dataclasses.replace(alone, length=alone.length - behind)
            position = position - behind
        places = position[:, None] + jnp.arange(size)[None]
        got, here = apply(model, params, step, places, mask, here)
        want, alone = apply(model, params, step, places, mask, alone)
        assert float(jnp.std(want)) > 0.1
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        position = position + size
    np.testing.assert_array_equal(here.length + P, alone.length)
    np.testing.assert_array_equal(here.mask, alone.mask[:, P:])
    assert here.keys[0].shape[:3] == (rows, 2, 7) and here.prefix.keys[0].shape[:3] == (N, 2, P)
    jax.tree.map(np.testing.assert_array_equal, here.prefix.keys, cache.keys)


def test_attention_over_two_parts_is_one_softmax():
    """Against sums written out in float64, with hand-made columns of either part out of sight."""
    rng = np.random.default_rng(0)
    g, r, d, own = 2, 2, 4, 3
    query = rng.normal(size=(N * K, 1, g, r, d))
    (before_k, before_v), (own_k, own_v) = (
        [rng.normal(size=(rows, g, width, d)) for _ in range(2)]
        for rows, width in ((N, P), (N * K, own))
    )
    attend = rng.random((N * K, 1, P + own)) < 0.6
    attend[0], attend[1, :, :P], attend[2, :, P:] = True, False, False  # all; one part; the other
    attend[1:3, :, [P - 1, P]] = [[[False, True]], [[True, False]]]

    def single(x):
        return jnp.asarray(x, jnp.float32)

    got = attention(
        single(query), single(own_k), single(own_v), jnp.asarray(attend),
        prefix=(single(before_k), single(before_v)), scale=0.7, softcap=1.5,
    )  # fmt: skip
    for row in range(N * K):
        seen = attend[row, 0]
        for head in range(g):
            keys = np.concatenate([before_k[row // K, head], own_k[row, head]])[seen]
            values = np.concatenate([before_v[row // K, head], own_v[row, head]])[seen]
            for q in range(r):
                score = np.exp(1.5 * np.tanh(0.7 * keys @ query[row, 0, head, q] / 1.5))
                want = score @ values / score.sum()
                np.testing.assert_allclose(got[row, 0, head, q], want, atol=2e-6)


def test_bfloat16_rounds_the_sum_of_both_parts_once():
    rng = np.random.default_rng(1)
    query, keys, values = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((K, 1, 1, 2, 8), (K, 1, 9, 8), (K, 1, 9, 8))
    )
    keys, values = (x.at[:, :, :P].set(x[:1, :, :P]) for x in (keys, values))  # one group of K
    seen = jnp.ones((K, 1, 9), bool)
    prefix = (keys[:1, :, :P], values[:1, :, :P])
    got = attention(query, keys[:, :, P:], values[:, :, P:], seen, prefix=prefix)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, attention(query, keys, values, seen))


def test_a_prefix_of_rows_that_are_no_groups_is_refused():
    model, stacked = tiny()
    params = model.unstack(stacked)
    cache, _ = prefilled(model, params)
    prefix = Prefix(keys=cache.keys, values=cache.values, mask=cache.mask)
    odd = dataclasses.replace(model.init_cache(3, 4), prefix=prefix)
    with pytest.raises(ValueError, match="a cache of 3 rows has a prefix of 2"):
        model.apply(params, *plain(3, 1), odd)
