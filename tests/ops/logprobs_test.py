"""Token log-probs against a float64 loop; chunks against the whole."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import logprobs


def reference(logits, tokens, temperature):
    """Log-probs and entropies by loop in float64; probabilities of 0 add nothing."""
    chosen, entropies = [], []
    for row, token in zip(np.asarray(logits, np.float64), tokens, strict=True):
        scaled = row / temperature
        total = scaled.max() + math.log(np.exp(scaled - scaled.max()).sum())
        logps = scaled - total
        chosen.append(logps[token])
        entropies.append(-sum(math.exp(v) * v for v in logps if v > -math.inf))
    return chosen, entropies


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_against_a_loop(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (6, 9)).astype(np.float32)
    tokens = rng.integers(0, 9, 6)
    found = logprobs.token_logprobs(logits, tokens, temperature)
    wanted = reference(logits, tokens, temperature)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-6)


def test_by_hand():
    found, entropy = logprobs.token_logprobs(jnp.zeros((2, 4)), jnp.array([0, 3]), 0.7)
    np.testing.assert_allclose(found, -math.log(4), rtol=1e-6)
    np.testing.assert_allclose(entropy, math.log(4), rtol=1e-6)


def test_temperature_zero_counts_as_one_even_when_traced():
    logits = jax.random.normal(jax.random.key(0), (3, 5))
    tokens = jnp.array([1, 2, 3])
    at_one = logprobs.token_logprobs(logits, tokens, 1.0)
    at_zero = jax.jit(logprobs.token_logprobs)(logits, tokens, jnp.array(0.0))
    for a, b in zip(at_one, at_zero, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_impossible_tokens_are_finite_in_entropy_and_gradient():
    logits = jnp.array([[0.0, -jnp.inf, 1.0, -jnp.inf]])

    def total(logits):
        found, entropy = logprobs.token_logprobs(logits, jnp.array([2]), 1.0)
        return jnp.sum(found + entropy)

    found, entropy = logprobs.token_logprobs(logits, jnp.array([2]), 1.0)
    wanted = reference(logits, [2], 1.0)
    np.testing.assert_allclose(found, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(entropy, wanted[1], rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(total)(logits)))
    assert logprobs.token_logprobs(logits, jnp.array([1]), 1.0)[0][0] == -jnp.inf


def test_huge_logits_and_low_precision():
    logits = jnp.array([[1e4, 0.0, -1e4]], jnp.bfloat16)
    found, entropy = logprobs.token_logprobs(logits, jnp.array([0]), 1.0)
    assert found.dtype == entropy.dtype == jnp.float32
    assert float(found[0]) == 0.0 and float(entropy[0]) == 0.0


def head():
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (2, 7, 4))
    kernel = jax.random.normal(keys[1], (4, 11))
    return hidden, kernel, jax.random.randint(keys[2], (2, 7), 0, 11)


@pytest.mark.parametrize(
    ("chunk", "keep"), [(1, False), (2, False), (3, False), (3, True), (7, False), (100, True)]
)
def test_chunks_equal_the_whole_in_value_and_gradient(chunk, keep):
    hidden, kernel, tokens = head()

    def whole(hidden, kernel):
        return logprobs.token_logprobs(hidden @ kernel, tokens, 0.7)

    def chunked(hidden, kernel):
        return logprobs.chunked_logprobs(
            hidden,
            lambda h: h @ kernel,
            tokens,
            temperature=0.7,
            chunk=chunk,
            keep_logits=keep,
        )

    def total(f):
        return lambda h, k: jnp.sum(f(h, k)[0] * tokens) + jnp.sum(f(h, k)[1])

    for a, b in zip(whole(hidden, kernel), chunked(hidden, kernel), strict=True):
        assert b.shape == (2, 7)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    wanted = jax.grad(total(whole), argnums=(0, 1))(hidden, kernel)
    found = jax.grad(total(chunked), argnums=(0, 1))(hidden, kernel)
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_logits_of_all_positions_are_never_formed():
    rows, length, width, vocabulary, chunk = 2, 64, 4, 512, 8
    tokens = jnp.zeros((rows, length), int)

    def total(hidden, kernel):
        found, entropy = logprobs.chunked_logprobs(
            hidden, lambda h: h @ kernel, tokens, temperature=1.0, chunk=chunk
        )
        return jnp.sum(found) + jnp.sum(entropy)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, length, width), (4, 512))]
    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
    peak = compiled.memory_analysis().temp_size_in_bytes
    assert peak < rows * length * vocabulary * 4  # one copy of the full logits


@pytest.mark.parametrize("chunk", [7, 3])
def test_logits_that_are_kept_are_not_made_twice(chunk):
    hidden, kernel, tokens = head()

    def products(keep):
        def total(hidden):
            options = dict(chunk=chunk, keep_logits=keep)
            found, _ = logprobs.chunked_logprobs(hidden, lambda h: h @ kernel, tokens, **options)
            return jnp.sum(found)

        return str(jax.make_jaxpr(jax.grad(total))(hidden)).count("dot_general")

    assert (products(True), products(False)) == (2, 3)


def test_chunk_must_be_positive():
    hidden, kernel, tokens = head()
    with pytest.raises(ValueError, match="chunk=0"):
        logprobs.chunked_logprobs(hidden, lambda h: h @ kernel, tokens, chunk=0)
