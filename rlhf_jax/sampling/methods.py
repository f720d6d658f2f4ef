"""How one token is drawn from logits: temperature, truncation without sorting, counted noise.

A token is argmax_v (z_v/τ + g_v) with Gumbel noise g, which is a draw from softmax(z/τ).
Truncation sets logits below a threshold to −∞. Thresholds are found by bisection over the
ordered float32 numbers: 32 comparisons of the whole row give the exact k-th largest logit,
where sorting a vocabulary of 150,000 is the slowest step of a decode loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from rlhf_jax.ops.logprobs import scale_logits, token_logprobs
from rlhf_jax.types import Array, Sampling

Keys = Key[jax.Array, " B"]


def make_sampling(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Sampling:
    """Checked sampling values as traced scalars; new values never compile anything again.

    Only whether anything truncates at all (`truncates`) is compiled in.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: how many of the largest logits survive; 0 = all.
        top_p: the smallest set of best tokens with at least this mass survives; 1 = all.
        min_p: tokens of at least this share of the best token's probability survive; 0 = all.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; wanted 0 (greedy) or a positive number")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}; wanted 0 (off) or a positive count")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; wanted above 0 and up to 1 (1 is off)")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}; wanted from 0 (off) to 1")
    return Sampling(
        temperature=np.asarray(temperature, np.float32),
        top_k=np.asarray(top_k, np.int32),
        top_p=np.asarray(top_p, np.float32),
        min_p=np.asarray(min_p, np.float32),
        truncates=top_k > 0 or top_p < 1 or min_p > 0,
    )


def _ordered(x: Float[Array, " B"]) -> Int[Array, " B"]:
    """float32 -> int32 that sorts the same way (its own inverse after a bit cast)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unordered(i: Int[Array, " B"]) -> Float[Array, " B"]:
    bits = jnp.where(i < 0, i ^ 0x7FFFFFFF, i)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def largest_threshold(
    logits: Float[Array, "B V"],
    holds: Callable[[Bool[Array, "B V"]], Bool[Array, " B"]],
) -> Float[Array, " B"]:
    """The largest τ with ``holds(logits >= τ)``, between the smallest and largest logit.

    `holds` must be true of the whole row or the smallest logit is returned, and must not turn
    true again once false as τ rises. Exact: 2³² floats are halved 32 times.
    """
    low = _ordered(jnp.min(logits, axis=-1))
    high = _ordered(jnp.max(logits, axis=-1)) + 1  # the first float that is too large

    def halve(_, bounds):
        low, high = bounds
        # floor((low + high) / 2) without overflow
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        kept = holds(logits >= _unordered(middle)[:, None])
        return jnp.where(kept, middle, low), jnp.where(kept, high, middle)

    return _unordered(jax.lax.fori_loop(0, 32, halve, (low, high))[0])


def truncate(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits (already divided by the temperature) with −∞ where top-k, top-p or min-p cut.

    In this order: top-k, then top-p over what top-k left, then min-p, as transformers applies
    them. Equal logits share one fate, so ties at the threshold all stay; the best token always
    stays.
    """
    if not sampling.truncates:
        return logits
    vocab = logits.shape[-1]
    count = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    threshold = largest_threshold(logits, lambda kept: jnp.sum(kept, axis=-1) >= count)
    logits = jnp.where(logits >= threshold[:, None], logits, -jnp.inf)

    probs = jax.nn.softmax(logits, axis=-1)
    threshold = largest_threshold(
        logits, lambda kept: jnp.sum(probs, axis=-1, where=kept) >= sampling.top_p
    )
    # At top_p = 1 rounding of the sum would decide, so it is off by comparison.
    keep = (logits >= threshold[:, None]) | (sampling.top_p >= 1)
    best = jnp.max(logits, axis=-1, keepdims=True)
    keep &= logits >= best + jnp.log(sampling.min_p)  # log 0 = −∞ keeps all
    return jnp.where(keep, logits, -jnp.inf)


def row_keys(
    key: Key[jax.Array, ""],
    source: Int[Array, " B"],
    record: Int[Array, " B"],
    draw: Int[Array, " B"],
    sample: Int[Array, " B"],
) -> Keys:
    """One key per row from counters only: neither the batch nor the row's place in it counts.

    Args:
        key: holds (seed, purpose, step) already.
        source: data set of the prompt.
        record: index in that data set.
        draw: how often the record was drawn before.
        sample: 0..K-1 within the group.
    """

    def one(source, record, draw, sample):
        row_key = key
        for counter in (source, record, draw, sample):
            row_key = jax.random.fold_in(row_key, counter)
        return row_key

    return jax.vmap(one)(source, record, draw, sample)


def noise(keys: Keys, position: Int[Array, ""] | int, vocab: int) -> Float[Array, "B V"]:
    """Standard Gumbel noise of one position: g = −log(−log(1 − u)), u uniform in (0, 1).

    u is (r + ½)·2⁻³² for 32 random bits r. Small u, which make the large g that let unlikely
    tokens win, are exact down to 2⁻³³; `jax.random.gumbel` from as many bits ends at 2⁻²³, so
    tokens below a probability of about 1e-7 would hardly ever be drawn.
    """

    def one(row_key):
        return jax.random.bits(jax.random.fold_in(row_key, position), (vocab,), jnp.uint32)

    bits = jax.vmap(one)(keys)
    uniform = (bits.astype(jnp.float32) + 0.5) * np.float32(2.0**-32)
    # Rounding reaches 1 at the other end, where log(1 − u) has no value.
    uniform = jnp.minimum(uniform, np.float32(1 - 2.0**-24))
    return -jnp.log(-jnp.log1p(-uniform))


def first_largest(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """``jnp.argmax`` of rows without NaN. As two plain reductions: in that of pairs, XLA on CPUs
    computes everything that x is made of, the noise here, element by element."""
    largest = jnp.max(x, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.min(jnp.where(x == largest, index, x.shape[-1] - 1), axis=-1)


def draw_token(
    logits: Float[Array, "B V"], keys: Keys, position: Int[Array, ""] | int, sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Tokens, their log-probs, and their log-probs in the truncated distribution (nats).

    Both log-probs are at the sampling temperature (1 where it is 0, greedy); only the second
    knows of top-k, top-p and min-p.
    """
    scaled = scale_logits(logits, sampling.temperature)
    kept = truncate(scaled, sampling)
    gumbel = noise(keys, position, logits.shape[-1])
    tokens = first_largest(kept + jnp.where(sampling.temperature > 0, gumbel, 0.0))
    logprobs, _ = token_logprobs(logits, tokens, sampling.temperature)
    behaviour = token_logprobs(kept, tokens)[0] if sampling.truncates else logprobs
    return tokens, logprobs, behaviour
