"""Scalar heads: one number per token from the final hidden state (value, outcome, process)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.types import Array


def kernel_scale(name: str, width: int) -> float:
    """Standard deviation of a head's initial weights.

    Scoring heads start at 1/√(D+1), so scores of normalised hidden states have variance about
    1 (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix B.1). The value head
    starts at 0: before it has seen a return it predicts none, instead of noise of the
    rewards' own size.
    """
    return 0.0 if name == "value" else (width + 1) ** -0.5


def has_bias(name: str) -> bool:
    """Whether a head adds a constant: all but the outcome head do.

    Preferences do not see a constant, and the published form of an outcome model, a sequence
    classifier with one label, has no place for one.
    """
    return name != "outcome"


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
