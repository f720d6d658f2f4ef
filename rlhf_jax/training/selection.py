"""Dynamic sampling: groups without signal give way to groups of further draws.

Yu et al., 2025, DAPO, https://arxiv.org/abs/2503.14476, section 3.2. Shapes never change: the
best N groups seen so far are kept, those with signal first, in the order in which they were
drawn. What is still without signal after the last draw fills the batch up, is counted, and trains
nothing: whoever selects empties the masks of these groups in its targets.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from rlhf_jax.ops.metrics import single
from rlhf_jax.types import Array, Metrics, Rollouts, Scores

Batch = tuple[Rollouts, Scores]


def refill(
    kept: Batch, kept_signal: Bool[Array, " N"], fresh: Batch, fresh_signal: Bool[Array, " N"]
) -> tuple[Batch, Bool[Array, " N"]]:
    """The first N groups of both batches, those with signal first; and which of them have it."""
    groups = kept_signal.shape[0]
    signal = jnp.concatenate([kept_signal, fresh_signal])
    # Stable: among equals the order of drawing stays.
    order = jnp.argsort(~signal, stable=True)[:groups]

    def pick(old: Array, new: Array) -> Array:
        rows = old.shape[0] // groups
        both = jnp.concatenate([old, new]).reshape(2 * groups, rows, *old.shape[1:])
        return both[order].reshape(old.shape)

    return jax.tree.map(pick, kept, fresh), signal[order]


def draw_metrics(signal: Bool[Array, " N"], draws: int) -> Metrics:
    """`rollout/draws`, of N groups each, and `rollout/shortfall`, the groups of the batch that were
    still without signal after the last."""
    short = jnp.sum(~signal, dtype=jnp.float32)
    return {"rollout/draws": single(float(draws)), "rollout/shortfall": single(short)}
