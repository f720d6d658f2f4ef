"""Layers computed in chunks of rows: the numbers and gradients of all rows at once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import named_size
from rlhf_jax.models.passes import Layout, chunks_of
from rlhf_jax.models.transformer import decoder
from tests.models.batches import hidden_and_gradients, plain, tiny
from tests.models.since_test import LENGTH, rows_of_products

ROWS, WIDTH = 4, 10
TWO_ROWS = 2 * WIDTH
WINDOW = dict(window=3, local_layers=(True, False), rope_theta_local=50.0)


def values_and_gradients(layout, chunk, *, stacked=True, since=0, **options):
    """Hidden states of ragged rows, and the gradients of a sum of them."""
    model, params = tiny(**options, layer_chunk=chunk)
    params = params if stacked else model.unstack(params)
    tokens, positions, mask = plain(ROWS, WIDTH)
    given = (tokens, positions, mask.at[1, -2:].set(False))
    return hidden_and_gradients(model, params, given, layout, since)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (None, dict(stacked=False)),
        (Layout(4, 2), dict(WINDOW, since=3)),
        (Layout(4, 2), dict(stacked=False, since=3, lora_rank=2, lora_alpha=2.0)),
        (None, dict(positions="learned", max_positions=WIDTH, remat="none")),
        (None, dict(remat="full", qk_norm=True)),
    ],
)
def test_chunks_change_nothing(layout, options):
    whole = values_and_gradients(layout, 0, **options)
    cut = values_and_gradients(layout, TWO_ROWS, **options)
    assert jax.tree.structure(whole) == jax.tree.structure(cut)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("chunk", "rows", "length", "wanted"),
    [
        (0, 32, 192, 1),
        (1536, 32, 192, 4),
        (1535, 32, 192, 8),
        (10_000, 32, 192, 1),
        (1536, 32, 2000, 32),  # single rows are the least
        (500, 6, 200, 3),
        (300, 7, 100, 7),
        (500, 7, 100, 1),  # no equal chunks but small ones
        (500, 0, 100, 1),
    ],
)
def test_as_few_equal_chunks_as_keep_to_the_tokens(chunk, rows, length, wanted):
    assert chunks_of(named_size("tiny", layer_chunk=chunk), rows, length) == wanted


def test_rows_that_are_spread_over_devices_stay_together():
    config = named_size("tiny", layer_chunk=TWO_ROWS)
    for devices, wanted in ((1, 2), (2, 1)):
        with jax.set_mesh(jax.make_mesh((devices,), ("data",))):
            assert chunks_of(config, ROWS, WIDTH) == wanted


def test_gradients_of_bfloat16_leaves_are_added_up_in_float32():
    model = decoder(named_size("tiny", layer_chunk=WIDTH, param_dtype="bfloat16"))

    def total(params):
        return jnp.sum(model.apply(params, *plain(ROWS, WIDTH), None).hidden)

    text = str(jax.make_jaxpr(jax.grad(total))(model.shapes()))
    kernels = r":(\w+)\[64,4,16\] = add_any"  # of queries, whose gradients are a loop's carry
    assert re.findall(kernels, text) == ["f32"]


def test_products_have_the_tokens_of_a_chunk():
    model = decoder(named_size("tiny", mlp_width=136, layer_chunk=2 * LENGTH))
    assert rows_of_products(model, ROWS, 0) == {2 * LENGTH}
