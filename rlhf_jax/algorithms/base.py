"""What algorithms share: how scores become rewards. The protocol itself is `types.Algorithm`."""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.divergence import kl_estimate
from rlhf_jax.ops.masking import masked_sum, mean_of, place_at_last
from rlhf_jax.ops.surrogate import filled
from rlhf_jax.types import Array, CompletionOutput, Experience, Metrics, Scores


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


def policy_metrics(
    output: CompletionOutput,
    clipped: Bool[Array, "B T"],
    ratio: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Metrics:
    """How far the policy has moved since it sampled; means over the valid tokens.

    `policy/kl_old` is the k1 estimate of KL(old ‖ new) in nats, −log ρ, from the old policy's
    samples.
    """
    safe_ratio = jnp.where(mask, ratio, 1.0)
    return {
        "policy/clip_fraction": mean_of(clipped, mask),
        "policy/ratio": mean_of(ratio, mask),
        "policy/kl_old": mean_of(-jnp.log(safe_ratio), mask),
        "policy/entropy": mean_of(output.entropy, mask),
    }
