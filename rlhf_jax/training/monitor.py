"""What one batch of experience says about the policy: every mean is a `Mean`."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from rlhf_jax.algorithms.base import has_signal
from rlhf_jax.ops.divergence import kl_estimate
from rlhf_jax.ops.importance import log_weights
from rlhf_jax.ops.masking import masked_sum, mean_of
from rlhf_jax.ops.metrics import single
from rlhf_jax.types import Array, Experience, Mean, Scores


def _mean(values: Array) -> Mean:
    values = jnp.asarray(values, jnp.float32)
    return Mean(total=values.sum(), count=jnp.float32(values.size))


def signal_metrics(scores: Scores, group_size: int) -> dict[str, Mean]:
    """`rollout/groups_without_signal`: the share of groups whose rewards are all equal.

    Nothing for K = 1: a completion alone has nothing to differ from.
    """
    if group_size == 1:
        return {}
    return {"rollout/groups_without_signal": _mean(~has_signal(scores, group_size))}


def batch_metrics(
    experience: Experience,
    entropy: Float[Array, "B T"],
    step: Int[Array, ""],
    *,
    reference: bool,
) -> dict[str, Mean]:
    """Means over the batch, before the update.

    `objective/kl_ref` is the Monte Carlo KL(policy || reference) in nats per sequence (k1);
    `objective/score` is outcome plus process reward per sequence, without the KL term;
    `policy/sampler_gap` is the mean over tokens of |sampler - trainer log-prob| in nats.

    How far what was sampled from (truncated, maybe older) is from what the trainer evaluates, with
    log w = log π_old − log π_roll: `policy/kl_rollout` is KL(π_roll || π_old) in nats per token
    (k1, the mean of −log w), `policy/max_log_weight` the largest |log w| of the batch (a mean of
    count 1: this runs once a step, on the whole batch), `rollout/staleness` the policy steps made
    since a completion was sampled.

    Args:
        experience: the frozen batch.
        entropy: nats per token.
        step: policy steps made up to now.
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
    log_weight = log_weights(experience.logprobs, rollouts.behaviour_logprobs, jnp.asarray(mask))
    metrics["policy/kl_rollout"] = mean_of(-log_weight, mask)
    metrics["policy/max_log_weight"] = single(jnp.max(jnp.abs(log_weight)))
    metrics["rollout/staleness"] = _mean(step - rollouts.version)
    if reference:
        kl = kl_estimate(experience.logprobs, experience.ref_logprobs, "k1")
        metrics["objective/kl_ref"] = _mean(masked_sum(kl, mask, axis=-1))
    return metrics
