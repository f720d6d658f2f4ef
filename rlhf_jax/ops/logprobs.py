"""Log-probabilities of given tokens and the entropy of their distributions, in nats.

Always in float32, always at a temperature: the sampler divides logits by it, so whatever is
compared with the sampler's log-probs must do the same.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from rlhf_jax.types import Array

_LOGITS = "logits"
Scalar = Float[Array, ""] | float


def scale_logits(logits: Float[Array, "*B V"], temperature: Scalar) -> Float[Array, "*B V"]:
    """float32 logits / temperature; temperature 0 (greedy) counts as 1.

    Greedy sampling has no log-probs of its own, so those at temperature 1 are recorded.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    temperature = jnp.where(temperature > 0, temperature, 1.0)
    return logits.astype(jnp.float32) / jnp.reshape(temperature, (1,) * logits.ndim)


def token_logprobs(
    logits: Float[Array, "*B V"], tokens: Int[Array, "*B"], temperature: Scalar = 1.0
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Log-probability of each token and entropy of each distribution.

    z = logits / τ;  log p(y) = z_y − logsumexp z;  H = logsumexp z − Σ_v p_v z_v.

    Logits of −inf have probability 0 and contribute nothing to the entropy.
    """
    scaled = scale_logits(logits, temperature)
    log_total = jax.nn.logsumexp(scaled, axis=-1)
    # Compare and sum instead of a gather: it fuses, and splits over a sharded vocabulary.
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, scaled.ndim - 1)
    chosen = vocabulary == tokens[..., None].astype(jnp.int32)
    logprobs = jnp.sum(scaled, axis=-1, where=chosen) - log_total
    possible = jnp.where(scaled == -jnp.inf, 0.0, scaled)  # 0 * inf is NaN
    entropy = log_total - jnp.sum(jax.nn.softmax(scaled, axis=-1) * possible, axis=-1)
    return logprobs, entropy


def chunked_logprobs(
    hidden: Float[Array, "B T D"],
    logits_fn: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    tokens: Int[Array, "B T"],
    *,
    temperature: Scalar = 1.0,
    chunk: int = 128,
    keep_logits: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logprobs` from hidden states without ever forming logits of all positions.

    Chunks of positions go through `logits_fn` one after the other, and the backward pass
    computes each chunk's logits again: the peak is [B chunk V] instead of [B T V]. The batch
    axis stays whole, so its sharding is left alone.

    Args:
        hidden: final hidden states, each at the position *before* its token.
        logits_fn: the LM head; may close over traced parameters.
        tokens: the tokens whose log-probs are wanted.
        temperature: may be traced; 0 counts as 1.
        chunk: positions per chunk; the last chunk is padded if it does not divide T.
        keep_logits: the backward pass finds all logits, [B T V], where the forward pass left them;
            for small vocabularies.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; wanted 1 or more positions")

    def one_chunk(args):
        states, ids = args
        logits = checkpoint_name(logits_fn(states), _LOGITS)
        return token_logprobs(logits, ids, temperature)

    kept = (_LOGITS,) if keep_logits else ()
    policy = jax.checkpoint_policies.save_only_these_names(*kept)

    rows, length, _ = hidden.shape
    if length <= chunk:
        return jax.checkpoint(one_chunk, policy=policy)((hidden, tokens))
    chunks = -(-length // chunk)
    padding = chunks * chunk - length

    def split(x):  # [B T ...] -> [chunks B chunk ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(jnp.reshape(x, (rows, chunks, chunk, *x.shape[2:])), 1, 0)

    def join(x):  # [chunks B chunk] -> [B T]
        return jnp.reshape(jnp.moveaxis(x, 0, 1), (rows, chunks * chunk))[:, :length]

    # Inside a loop, common subexpressions cannot defeat the recomputation.
    body = jax.checkpoint(one_chunk, prevent_cse=False, policy=policy)
    logprobs, entropy = jax.lax.map(body, (split(hidden), split(tokens)))
    return join(logprobs), join(entropy)
