"""Matrices with outputs first in the decode loop: the numbers of those that lie as stored."""

import re

import jax
import numpy as np
import pytest

from rlhf_jax.models.turned import LEAST_TOKENS, MOST_ROWS, turns
from rlhf_jax.sampling import sampler
from tests.models.batches import drawn
from tests.sampling.sampler_test import CONFIG, K, N, T, arguments, jitted, make_model

ROWS = N * K
GPT2 = dict(
    gated_mlp=False, mlp_bias=True, qkv_bias=True, output_bias=True, norm="layer",
    positions="learned", max_positions=20,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        dict(param_dtype="bfloat16"),
        dict(tie_embeddings=True, logit_softcap=3.0, qk_norm=True),
        GPT2,
        dict(lora_rank=2),
    ],
)
def test_the_same_samples(changes, monkeypatch):
    model, _ = make_model(**changes)
    params = drawn(model)  # no bias or adapter is zero
    turned = jitted(model)(*arguments(params))
    monkeypatch.setattr(sampler, "turns", lambda *_: False)
    plain = jitted(model)(*arguments(params))
    np.testing.assert_array_equal(turned.tokens, plain.tokens)
    np.testing.assert_array_equal(turned.mask, plain.mask)
    np.testing.assert_allclose(turned.logprobs, plain.logprobs, atol=2e-6)


def products(text):
    """Shapes of the results of products in a compiled program."""
    found = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    return {tuple(int(n) for n in shape.split(",")) for shape in found}


def test_the_loop_has_weights_on_the_left_of_its_products(monkeypatch):
    model, params = make_model()
    wide, vocabulary = CONFIG.mlp_width, CONFIG.vocab_size
    run = jitted(model)
    found = products(run.lower(*arguments(params)).compile().as_text())
    assert {(wide, ROWS), (vocabulary, ROWS)} <= found
    assert not {(ROWS, wide), (ROWS, vocabulary)} & found
    monkeypatch.setattr(sampler, "turns", lambda *_: False)
    found = products(jitted(model).lower(*arguments(params)).compile().as_text())
    assert {(ROWS, wide), (ROWS, vocabulary)} <= found


def test_where_matrices_are_turned():
    assert turns(CONFIG, None, ROWS, T)
    assert not turns(CONFIG, None, 1, T)
    assert not turns(CONFIG, None, MOST_ROWS + 1, T)
    assert not turns(CONFIG, None, ROWS, LEAST_TOKENS - 1)
    assert not turns(make_model(compute_dtype="bfloat16")[0].config, None, ROWS, T)
    for devices, wanted in ((1, True), (2, False)):
        assert turns(CONFIG, jax.make_mesh((devices,), ("data",)), ROWS, T) == wanted
