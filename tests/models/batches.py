"""Random batches for the model tests: ragged prompts and completions, texts, moved params."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import Model, decoder
from rlhf_jax.types import Params, Prompts, Rollouts, Texts

VOCABULARY = 260


def rollouts(n: int, k: int, p: int, t: int, *, seed: int = 0) -> Rollouts:
    """N·K completions with every length from 1 to full; tokens at padding are random too."""
    rng = np.random.default_rng(seed)
    b = n * k
    prompt_lengths, lengths = rng.integers(1, p + 1, n), rng.integers(1, t + 1, b)
    prompt_lengths[0], lengths[0] = p, t
    mask = np.arange(t)[None] < lengths[:, None]
    zeros = jnp.zeros((b, t))
    prompts = Prompts(
        tokens=jnp.array(rng.integers(0, VOCABULARY, (n, p))),
        mask=jnp.array(np.arange(p)[None] >= p - prompt_lengths[:, None]),
        record=jnp.arange(n),
        source=jnp.zeros(n, int),
        draw=jnp.zeros(n, int),
    )
    return Rollouts(
        prompts=prompts,
        tokens=jnp.array(rng.integers(0, VOCABULARY, (b, t))),
        mask=jnp.array(mask),
        step_ends=jnp.zeros((b, t), bool),
        logprobs=zeros,
        behaviour_logprobs=zeros,
        truncated=jnp.zeros(b, bool),
        sample=jnp.arange(b) % k,
        version=jnp.zeros(b, int),
    )


def texts(m: int, s: int, *, seed: int = 0) -> Texts:
    """M right-padded rows of every length from 1 to full."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, s + 1, m)
    lengths[0] = s
    mask = jnp.array(np.arange(s)[None] < lengths[:, None])
    return Texts(
        tokens=jnp.array(rng.integers(0, VOCABULARY, (m, s))),
        mask=mask,
        loss_mask=mask,
        segment=mask.astype(int),
    )


@functools.cache
def tiny(**overrides) -> tuple[Model, Params]:
    """A decoder of the size "tiny" with params that no program had to be compiled for.

    Every leaf is random, so that no zero or one of the ordinary start hides a fault.
    """
    model = decoder(named_size("tiny", **overrides))
    return model, drawn(model)


def drawn(model: Model, seed: int = 1) -> Params:
    """Params of a model that no program had to be compiled for, every leaf random."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = path[-1].key == "scale"
        noise = 0.1 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + float(scale), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.shapes())


def hidden_and_gradients(model: Model, params: Params, given, layout, since: int, drop: int = 0):
    """Gradients of a sum of hidden states, and these: those from `since` on without the first
    `drop`."""

    def loss(params):
        hidden = model.apply(params, *given, None, layout, since=since).hidden[:, drop:]
        weight = jnp.cos(jnp.arange(hidden.size, dtype=jnp.float32)).reshape(hidden.shape)
        return jnp.sum(hidden * weight), hidden

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def plain(rows: int, length: int, *, seed: int = 0):
    """(tokens, positions, mask) of rows without padding."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length))
    positions = np.broadcast_to(np.arange(length), (rows, length))
    return jnp.array(tokens), jnp.array(positions), jnp.ones((rows, length), bool)
