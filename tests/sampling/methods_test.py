import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.sampling.methods import (
    draw_token,
    largest_threshold,
    make_sampling,
    noise,
    row_keys,
    truncate,
)

# 99.9 % points of the χ² distribution by degrees of freedom
CHI2 = {3: 16.27, 4: 18.47, 9: 27.88, 15: 37.70}


def keys_of(count: int, seed: int = 0):
    index = jnp.arange(count, dtype=jnp.int32)
    zero = jnp.zeros(count, jnp.int32)
    return row_keys(jax.random.key(seed), zero, index, zero, zero)


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def kept_by_sorting(row, top_k, top_p, min_p):
    """Which entries of one row survive, by sorting in float64 and going through one by one."""
    row = np.asarray(row, np.float64)
    keep = np.isfinite(row)
    if top_k:
        keep &= row >= np.sort(row)[::-1][min(top_k, row.size) - 1]
    if top_p < 1:
        p = softmax(np.where(keep, row, -np.inf))
        mass, threshold = 0.0, None
        for i in np.argsort(-row, kind="stable"):
            if mass >= top_p:
                break
            mass, threshold = mass + p[i], row[i]
        keep &= row >= threshold
    if min_p:
        p = softmax(row)
        keep &= p >= min_p * p.max() * (1 - 1e-9)
    return keep


def test_truncation_of_a_row_worked_by_hand():
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.3, 0.06, 0.04]]))

    def kept(**values):
        out = np.asarray(truncate(logits, make_sampling(**values)))[0]
        np.testing.assert_array_equal(out[np.isfinite(out)], np.asarray(logits)[0, out > -np.inf])
        return np.flatnonzero(np.isfinite(out)).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 2]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.45) == [1]
    assert kept(top_p=0.6) == [1, 2]  # the token that crosses 0.6 belongs to the set
    assert kept(top_p=0.85) == [0, 1, 2]
    assert kept(min_p=0.15) == [0, 1, 2]  # at least 0.15 · 0.5 = 0.075
    assert kept(min_p=1.0) == [1]
    assert kept(top_k=2, top_p=0.62) == [1]  # 0.5 of 0.8 is 0.625 after top-k
    assert kept(top_k=3, min_p=0.5) == [1, 2]


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e20])
def test_truncation_equals_sorting(scale):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(64, 50)) * scale).astype(np.float32)
    logits[::3] = np.round(logits[::3] / scale) * np.float32(scale)  # rows full of ties
    logits[1::4, ::5] = -np.inf
    logits[5] = -np.abs(logits[5])
    logits[6] = np.where(rng.random(50) < 0.5, 0.0, -0.0)
    run = jax.jit(truncate)
    for top_k in (0, 1, 3, 49, 50, 80):
        for top_p in (1e-6, 0.3, 0.9, 0.999, 1.0):
            for min_p in (0.0, 0.02, 0.5):
                sampling = make_sampling(top_k=top_k, top_p=top_p, min_p=min_p)
                if not sampling.truncates:
                    continue
                got = np.asarray(run(logits, sampling))
                wanted = [kept_by_sorting(row, top_k, top_p, min_p) for row in logits]
                np.testing.assert_array_equal(got > -np.inf, np.stack(wanted))
                np.testing.assert_array_equal(got, np.where(np.stack(wanted), logits, -np.inf))
    assert run._cache_size() == 1


def test_threshold_is_the_exact_float():
    rng = np.random.default_rng(1)
    exponents = 10.0 ** rng.integers(-30, 30, size=(8, 40))
    logits = (rng.normal(size=(8, 40)) * exponents).astype(np.float32)
    for k in (1, 2, 17, 40):
        got = largest_threshold(jnp.asarray(logits), lambda kept, k=k: kept.sum(axis=-1) >= k)
        np.testing.assert_array_equal(np.asarray(got), np.sort(logits, axis=-1)[:, -k])
    never = largest_threshold(jnp.asarray(logits), lambda kept: kept[:, 0] & False)
    np.testing.assert_array_equal(np.asarray(never), logits.min(axis=-1))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -0.5}, "min_p=-0.5"),
        ({"min_p": 2.0}, "min_p=2.0"),
    ],
)
def test_values_out_of_range_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        make_sampling(**values)


def test_noise_is_bit_identical_whatever_the_batch():
    draw = jax.jit(noise, static_argnums=2)
    keys = keys_of(64)
    for vocab in (5, 32, 257):
        whole = np.asarray(draw(keys, 3, vocab))
        for rows in (slice(0, 1), slice(7, 20), slice(63, 64)):
            np.testing.assert_array_equal(np.asarray(draw(keys[rows], 3, vocab)), whole[rows])
        order = np.random.default_rng(0).permutation(64)
        np.testing.assert_array_equal(np.asarray(draw(keys[order], 3, vocab)), whole[order])


def test_noise_differs_by_every_counter():
    one, two = jnp.ones(1, jnp.int32), jnp.full(1, 2, jnp.int32)
    rows = []
    for seed in (0, 1):
        key = jax.random.key(seed)
        for place in range(5):
            counters = [two if i == place else one for i in range(4)]
            rows.append(noise(row_keys(key, *counters), 0, 8)[0])
    rows.append(noise(row_keys(jax.random.key(0), one, one, one, one), 1, 8)[0])
    rows = np.stack(rows)
    assert len(np.unique(rows, axis=0)) == len(rows) == 11
    swapped = row_keys(jax.random.key(0), two, one, one, one)
    assert not np.array_equal(rows[1], np.asarray(noise(swapped, 0, 8))[0])


def test_noise_is_standard_gumbel():
    values = np.asarray(noise(keys_of(200), 0, 1000), np.float64)
    assert np.isfinite(values).all()
    assert abs(values.mean() - 0.5772157) < 0.01
    assert abs(values.var() - np.pi**2 / 6) < 0.02
    # exp(−exp(−g)) is uniform: sixteen equal bins
    counts = np.histogram(np.exp(-np.exp(-values)), bins=16, range=(0, 1))[0]
    assert np.sum((counts - values.size / 16) ** 2 / (values.size / 16)) < CHI2[15]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_distribution(temperature):
    logits = np.asarray([1.0, 0.0, -1.0, 2.0, 0.5], np.float32)
    rows = 20_000
    sampling = make_sampling(temperature)
    tokens, logprobs, behaviour = jax.jit(draw_token)(
        jnp.tile(logits, (rows, 1)), keys_of(rows), 0, sampling
    )
    p = softmax(logits / temperature)
    counts = np.bincount(np.asarray(tokens), minlength=5)
    assert np.sum((counts - rows * p) ** 2 / (rows * p)) < CHI2[4]
    np.testing.assert_allclose(np.asarray(logprobs), np.log(p)[np.asarray(tokens)], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(behaviour), np.asarray(logprobs))


def test_truncated_draws_follow_the_distribution_that_is_left():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=12).astype(np.float32)
    rows, temperature = 20_000, 0.8
    sampling = make_sampling(temperature, top_k=5, top_p=0.85)
    tokens, logprobs, behaviour = jax.jit(draw_token)(
        jnp.tile(logits, (rows, 1)), keys_of(rows, seed=3), 9, sampling
    )
    tokens = np.asarray(tokens)
    scaled = logits / temperature
    kept = kept_by_sorting(scaled, 5, 0.85, 0.0)
    assert kept.sum() == 4  # df = 3
    left = softmax(np.where(kept, scaled, -np.inf))
    counts = np.bincount(tokens, minlength=12)
    assert counts[~kept].sum() == 0
    expected = rows * left[kept]
    assert np.sum((counts[kept] - expected) ** 2 / expected) < CHI2[3]
    np.testing.assert_allclose(np.asarray(behaviour), np.log(left[tokens]), atol=1e-6)
    full = np.log(softmax(scaled))[tokens]
    np.testing.assert_allclose(np.asarray(logprobs), full, atol=1e-6)


def test_temperature_zero_is_greedy_with_logprobs_at_temperature_one():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(50, 9)).astype(np.float32)
    for values in ({}, {"top_k": 3}):
        tokens, logprobs, behaviour = draw_token(
            jnp.asarray(logits), keys_of(50), 0, make_sampling(0.0, **values)
        )
        best = logits.argmax(axis=-1)
        np.testing.assert_array_equal(np.asarray(tokens), best)
        wanted = np.log([softmax(row)[b] for row, b in zip(logits, best, strict=True)])
        np.testing.assert_allclose(np.asarray(logprobs), wanted, atol=1e-6)
        # What is left after top-k has more mass per token.
        gap = np.asarray(behaviour) - np.asarray(logprobs)
        assert (gap > 0).all() if values else (gap == 0).all()
