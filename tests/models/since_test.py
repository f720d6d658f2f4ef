"""Columns that nobody reads: the last layer leaves them out, and all else is as before."""

import re

import jax
import numpy as np
import pytest

from rlhf_jax.mesh import ShardingRules
from rlhf_jax.models import passes
from rlhf_jax.models.config import named_size
from rlhf_jax.models.passes import Layout
from rlhf_jax.models.transformer import decoder
from tests.models.batches import hidden_and_gradients, plain, tiny

ROWS, SINCE, WIDTH = 3, 4, 10
LENGTH = 40
WINDOW = dict(window=3, local_layers=(True, False), rope_theta_local=50.0)


def values_and_gradients(model, params, layout, since):
    """Hidden states from column `SINCE` on, and the gradients of a sum of them."""
    given = plain(ROWS, WIDTH)
    return hidden_and_gradients(model, params, given, layout, since, drop=SINCE - since)


@pytest.mark.parametrize(
    ("layout", "options", "stacked"),
    [
        (None, {}, False),
        (Layout(SINCE + 1, 1), {}, True),
        (Layout(SINCE + 2, 2), WINDOW, True),
        (None, dict(positions="learned", max_positions=WIDTH, remat="none"), True),
    ],
)
def test_what_is_not_read_changes_nothing(layout, options, stacked, monkeypatch):
    monkeypatch.setattr(passes, "LEAST_UNREAD", 1)
    model, params = tiny(**options)
    if not stacked:
        params = model.unstack(params)
    whole = values_and_gradients(model, params, layout, 0)
    part = values_and_gradients(model, params, layout, SINCE)
    assert jax.tree.structure(whole) == jax.tree.structure(part)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def rows_of_products(model, rows, since):
    """How many tokens each product of the layers' MLPs has."""
    given = plain(rows, LENGTH)

    def run(params):
        return model.apply(params, *given, None, since=since).hidden

    text = str(jax.make_jaxpr(run)(model.shapes()))
    width = model.config.mlp_width
    return {int(n) for n in re.findall(rf":f32\[(\d+),{width}\] = dot_general", text)}


def test_the_last_layer_is_apart_where_that_saves_more_than_it_costs():
    config, since = named_size("tiny", mlp_width=136), 32
    model = decoder(config)
    few, enough = 1, passes.LEAST_UNREAD * (config.layers - 1) // since
    assert rows_of_products(model, few, since) == {few * LENGTH}
    assert rows_of_products(model, enough, since) == {enough * LENGTH, enough * (LENGTH - since)}
    assert rows_of_products(model, enough, 0) == {enough * LENGTH}
    deep = decoder(named_size("tiny", mlp_width=136, layers=passes.MOST_LAYERS + 1))
    assert rows_of_products(deep, 100 * enough, since) == {100 * enough * LENGTH}
    spread = decoder(config, ShardingRules(length="data"))
    assert rows_of_products(spread, enough, since) == {enough * LENGTH}


def test_a_cache_is_filled_whole_and_the_last_token_alone_comes_out():
    model, params = tiny()
    params = model.unstack(params)
    given = plain(ROWS, WIDTH)

    @jax.jit
    def prefill(params):
        caches = (model.init_cache(ROWS, WIDTH) for _ in range(2))
        whole, part = (
            model.apply(params, *given, cache, since=since)
            for cache, since in zip(caches, (0, WIDTH - 1), strict=True)
        )
        return whole, part

    whole, part = prefill(params)
    assert part.hidden.shape[1] == 1
    np.testing.assert_allclose(whole.hidden[:, -1:], part.hidden, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, whole.cache, part.cache)
