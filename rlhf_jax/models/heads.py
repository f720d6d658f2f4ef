"""Scalar heads: one number per token from the final hidden state.

What a head says is in its name: "value", "outcome" and "process"; "expected" beside "outcome"
makes an advantage model (`rlhf_jax.ops.advantage`), "quality" and "length" make ODIN
(`rlhf_jax.ops.odin`).
A head of another name is one of the user's own.
"""

from collections.abc import Collection, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.types import Array

VALUE_HEAD, EXPECTED_HEAD = "value", "expected"
OUTCOME_HEAD, QUALITY_HEAD, LENGTH_HEAD = "outcome", "quality", "length"
# Heads that speak of a token before they see it: of what is to come after a prompt.
EARLY_HEADS = (VALUE_HEAD, EXPECTED_HEAD)


def is_advantage(heads: Collection[str]) -> bool:
    """Whether a model with these heads is an advantage model: its score is outcome − expected."""
    return EXPECTED_HEAD in heads and OUTCOME_HEAD in heads


def is_odin(heads: Collection[str]) -> bool:
    """Whether a model with these heads is ODIN's: its score is quality, length is dropped."""
    return QUALITY_HEAD in heads and LENGTH_HEAD in heads


def judging_head(heads: Sequence[str]) -> str:
    """The head that judges whole texts: outcome, ODIN's quality, or else the first one."""
    if OUTCOME_HEAD in heads:
        return OUTCOME_HEAD
    return QUALITY_HEAD if is_odin(heads) else heads[0]


def kernel_scale(name: str, width: int) -> float:
    """Standard deviation of a head's initial weights.

    Scoring heads start at 1/√(D+1), so scores of normalised hidden states have variance about
    1 (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix B.1). Heads that expect
    something (value, expected) start at 0: before they have seen a return or a score they predict
    none, instead of noise of the rewards' own size.
    """
    return 0.0 if name in EARLY_HEADS else (width + 1) ** -0.5


def has_bias(name: str) -> bool:
    """Whether a head adds a constant: all but those do that only preferences train.

    Preferences do not see a constant, and the published form of an outcome model, a sequence
    classifier with one label, has no place for one.
    """
    return name not in (OUTCOME_HEAD, QUALITY_HEAD, LENGTH_HEAD)


class ScalarHead(nn.Module):
    """score = w · h (+ b), in float32 at full precision whatever the compute type."""

    scale: float
    bias: bool
    param_dtype: str

    @nn.compact
    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        dtype = jnp.dtype(self.param_dtype)
        width = hidden.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(self.scale), (width,), dtype)
        # TPU multiplies float32 in bfloat16 by default: rewards would lose 16 bits.
        scores = jnp.matmul(
            hidden.astype(jnp.float32),
            kernel.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (), dtype)
            scores = scores + bias.astype(jnp.float32)
        return scores
