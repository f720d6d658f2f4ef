"""Sampling: tokens per second of `sampler.generate` on a 0.5B-shaped model.

    python -m benchmarks.decode [--small]

Every row runs to its full length (no token ends a text), so the rate is that of busy rows. A
step cannot be faster than reading the weights and the live part of the cache once; its share of
that limit is given with the copy rate measured in the same process.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ceilings import copy_rate
from benchmarks.common import (
    median_seconds,
    model_config,
    parse_small,
    peak_gib,
    report,
    rounded,
)
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import decoder
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.types import Params, Prompts, TokenTables


class Shape(NamedTuple):
    """Rows B in groups of K, prompt length P, completion length T."""

    rows: int
    samples: int
    prompt: int
    tokens: int


SHAPES = (Shape(8, 4, 128, 256), Shape(256, 4, 128, 256))
SMALL_SHAPES = (Shape(4, 2, 8, 16),)


def random_prompts(shape: Shape, vocab: int) -> Prompts:
    """Prompts of random tokens without padding."""
    count = shape.rows // shape.samples
    tokens = np.random.default_rng(0).integers(vocab, size=(count, shape.prompt))
    return Prompts(
        tokens=jnp.asarray(tokens, jnp.int32),
        mask=jnp.ones((count, shape.prompt), bool),
        record=jnp.arange(count, dtype=jnp.int32),
        source=jnp.zeros(count, jnp.int32),
        draw=jnp.zeros(count, jnp.int32),
    )


def endless_tables(vocab: int) -> TokenTables:
    """No token ends a text or a step."""
    never = jnp.zeros(vocab, bool)
    return TokenTables(
        ends_text=never,
        ends_step=never,
        text_before=never,
        text_after=never,
        pad=jnp.asarray(0, jnp.int32),
    )


def step_bytes(params: Params, config: ModelConfig, shape: Shape) -> float:
    """Bytes one decode step must read: the weights, and keys and values of the mean length."""
    width = jnp.dtype(config.compute_dtype).itemsize
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    columns = shape.prompt + shape.tokens / 2
    cache = 2 * config.layers * shape.rows * config.kv_heads * config.head_dim * columns
    return width * (weights + cache)


def measure(small: bool) -> dict[str, Any]:
    """Tokens per second and milliseconds per step (prefill included), by number of rows."""
    config = model_config(small)
    model = decoder(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tables = endless_tables(config.vocab_size)
    ceiling = copy_rate(small)
    figures = {}
    for shape in SMALL_SHAPES if small else SHAPES:
        sample = jax.jit(
            functools.partial(
                generate, model, samples=shape.samples, max_tokens=shape.tokens, version=0
            )
        )
        run = functools.partial(
            sample,
            params,
            {},
            random_prompts(shape, config.vocab_size),
            jax.random.key(1),
            sampling=make_sampling(),
            tables=tables,
        )
        if not bool(run().mask.all()):
            raise RuntimeError("a row ended early, so the rate would be too high")
        seconds = median_seconds(run, 3)
        step = seconds / shape.tokens
        figures[f"rows_{shape.rows}"] = {
            "tokens_per_s": rounded(shape.rows * shape.tokens / seconds),
            "step_ms": rounded(1e3 * step),
            "share_of_copy_ceiling": rounded(step_bytes(params, config, shape) / step / ceiling),
        }
    return figures | {"peak_gib": peak_gib()}


if __name__ == "__main__":
    small = parse_small(__doc__)
    report("decode", small, measure(small))
