"""What algorithms share: how scores become rewards. The protocol itself is `types.Algorithm`."""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.divergence import kl_estimate
from rlhf_jax.ops.masking import masked_sum, place_at_last
from rlhf_jax.ops.surrogate import filled
from rlhf_jax.types import Array, Experience, Scores


def token_rewards(
    experience: Experience, *, kl_coef: Float[Array, ""] | float, estimator: str = "k1"
) -> Float[Array, "B T"]:
    """The reward of each token; 0 in padding.

    r_t = process_t + outcome · 1[t is the last token] − β KL_t

    with KL_t the chosen estimator between the policy that sampled and the reference, in nats.
    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, equation 2, per token.
    """
    mask = experience.rollouts.mask
    process, logprobs, ref_logprobs = filled(
        mask, experience.scores.process, experience.logprobs, experience.ref_logprobs
    )
    outcome = place_at_last(experience.scores.outcome.astype(jnp.float32), mask)
    penalty = kl_coef * kl_estimate(logprobs, ref_logprobs, estimator)
    return jnp.where(mask, process + outcome - penalty, 0.0)


def sequence_rewards(scores: Scores, mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """One reward per completion: the outcome plus the sum of the process scores."""
    return scores.outcome.astype(jnp.float32) + masked_sum(scores.process, mask, axis=-1)
