"""What one batch of experience says about the policy: every mean is a `Mean`."""

import jax.numpy as jnp

from rlhf_jax.ops.divergence import kl_estimate
from rlhf_jax.ops.masking import masked_sum, mean_of
from rlhf_jax.types import Array, Experience, Mean


def _mean(values: Array) -> Mean:
    values = jnp.asarray(values, jnp.float32)
    return Mean(total=values.sum(), count=jnp.float32(values.size))


def batch_metrics(experience: Experience, entropy: Array, *, reference: bool) -> dict[str, Mean]:
    """Means over the batch, before the update.

    `objective/kl_ref` is the Monte Carlo KL(policy || reference) in nats per sequence (k1);
    `objective/score` is outcome plus process reward per sequence, without the KL term;
    `policy/sampler_gap` is the mean over tokens of |sampler - trainer log-prob| in nats.

    Args:
        experience: the frozen batch.
        entropy: [B T] nats per token.
        reference: whether reference log-probs were computed.
    """
    rollouts, scores = experience.rollouts, experience.scores
    mask = rollouts.mask
    process = masked_sum(scores.process, mask, axis=-1)
    metrics = {
        "objective/score": _mean(scores.outcome + process),
        "rollout/length": _mean(mask.sum(-1)),
        "rollout/truncated": _mean(rollouts.truncated),
        "rollout/steps": _mean((rollouts.step_ends & mask).sum(-1)),
    }
    metrics |= {f"reward/{name}": _mean(part) for name, part in scores.parts.items()}
    metrics["rollout/entropy"] = mean_of(entropy, mask)
    gap = jnp.abs(jnp.where(mask, experience.logprobs - rollouts.logprobs, 0.0))
    metrics["policy/sampler_gap"] = mean_of(gap, mask)
    if reference:
        kl = kl_estimate(experience.logprobs, experience.ref_logprobs, "k1")
        metrics["objective/kl_ref"] = _mean(masked_sum(kl, mask, axis=-1))
    return metrics
