"""Scalar heads: literal scores, precision, and where each head starts."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import named_size
from rlhf_jax.models.heads import ScalarHead, kernel_scale
from rlhf_jax.models.transformer import decoder


def test_score_is_the_affine_function_of_the_hidden_state():
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array(0.5)}
    hidden = jnp.array([[[1.0, 1.0], [3.0, 0.0]]])
    out = ScalarHead(1.0, True, "float32").apply({"params": params}, hidden)
    np.testing.assert_array_equal(out, [[-0.5, 3.5]])


def test_scores_are_float32_whatever_the_stored_type():
    head = ScalarHead(1.0, False, "bfloat16")
    params = head.init(jax.random.key(0), jnp.zeros((1, 8)))["params"]
    assert params["kernel"].dtype == jnp.bfloat16
    hidden = jnp.full((1, 8), 1.0 + 2**-12)  # not a bfloat16 number
    want = np.sum(np.asarray(params["kernel"], np.float32)) * np.float32(1 + 2**-12)
    out = head.apply({"params": params}, hidden)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out[0], want, rtol=1e-6)


def test_value_starts_at_zero_and_scoring_heads_with_variance_one():
    assert kernel_scale("value", 64) == 0.0
    config = named_size("tiny", width=1024, score_heads=("value", "outcome", "process"))
    heads = jax.jit(decoder(config).init)(jax.random.key(0))["heads"]
    assert set(heads) == {"value", "outcome", "process"}
    assert float(jnp.abs(heads["value"]["kernel"]).max()) == 0
    for name in ("outcome", "process"):
        assert 0.9 < float(jnp.sum(heads[name]["kernel"] ** 2)) < 1.1
    assert heads["process"]["bias"] == 0
    assert "bias" not in heads["outcome"]  # a sequence classifier has no place for it
    assert float(jnp.abs(heads["outcome"]["kernel"] - heads["process"]["kernel"]).max()) > 0
