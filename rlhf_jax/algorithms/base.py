"""What algorithms share: how scores become rewards and advantages, and the surrogate's terms.

The protocol itself is `types.Algorithm`. `group_relative` is the family that compares the samples
of one prompt: its members differ in values alone.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops import groups
from rlhf_jax.ops.divergence import kl_estimate
from rlhf_jax.ops.masking import masked_sum, mean_of, place_at_last
from rlhf_jax.ops.returns import reward_to_go
from rlhf_jax.ops.surrogate import (
    Surrogate,
    aggregate,
    check_surrogate,
    filled,
    policy_loss,
    policy_ratio,
)
from rlhf_jax.types import (
    Algorithm,
    Array,
    CompletionOutput,
    Experience,
    KlCoef,
    Metrics,
    Needs,
    Scores,
    Targets,
    Term,
)

SCALES = ("std", "none")
CREDITS = ("sequence", "steps")


def token_rewards(
    experience: Experience, *, kl_coef: Float[Array, ""] | float | int, estimator: str = "k1"
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


def driven(experience: Experience, kl_coef: float | int) -> Float[Array, ""] | float | int:
    """β in this step: what a controller says, else `kl_coef`; 0 (no such term) stays 0."""
    if experience.kl_coef is None or not kl_coef:
        return kl_coef
    return experience.kl_coef


def drivable(kl_coef: float | int, most: float = math.inf) -> KlCoef | None:
    """`Algorithm.kl_coef` of an algorithm that reads its β through `driven`; None where it is 0."""
    return KlCoef(start=kl_coef, most=most) if kl_coef else None


def sequence_rewards(scores: Scores, mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """One reward per completion: the outcome plus the sum of the process scores."""
    return scores.outcome.astype(jnp.float32) + masked_sum(scores.process, mask, axis=-1)


def penalised_scores(experience: Experience, surrogate: Surrogate) -> Scores:
    """The scores; the outcome less β Σ_t KL_t where the surrogate wants the KL in the rewards."""
    scores = experience.scores
    if not surrogate.reward_kl:
        return scores
    beta = driven(experience, surrogate.reward_kl)
    penalty = beta * sequence_kl(experience, surrogate.kl_estimator)
    return dataclasses.replace(scores, outcome=scores.outcome.astype(jnp.float32) - penalty)


def sequence_kl(experience: Experience, estimator: str) -> Float[Array, " B"]:
    """Σ_t KL_t between the policy that sampled and the reference, in nats per completion."""
    mask = experience.rollouts.mask
    logprobs, ref_logprobs = filled(mask, experience.logprobs, experience.ref_logprobs)
    return masked_sum(kl_estimate(logprobs, ref_logprobs, estimator), mask, axis=-1)


def part_of(scores: Scores, reward: str, asks: str) -> Float[Array, " B"]:
    """The unweighted scores of the reward with that label; a ValueError, in the name of whoever
    asks, for a label that is none."""
    if reward not in scores.parts:
        known = ", ".join(sorted(scores.parts)) or "none"
        raise ValueError(f"{asks}: no reward {reward!r}; known: {known}")
    return scores.parts[reward]


def has_signal(scores: Scores, group_size: int) -> Bool[Array, " N"]:
    """Groups whose rewards are not all equal: only these say which sample is better.

    Process scores count in every column: those of padding are to be 0 (`masking.fill_padding`).
    Yu et al. 2025, https://arxiv.org/abs/2503.14476, equation 11, for any reward.
    """
    rewards = scores.outcome.astype(jnp.float32) + jnp.sum(scores.process, axis=-1)
    return groups.group_varies(rewards, group_size)


def spread(x: Float[Array, " B"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """A number of each completion at every token of it; 0 in padding."""
    return jnp.where(mask, x[:, None], 0.0)


def or_nan(
    x: Float[Array, " B"], rewards: Float[Array, " B"], group_size: int
) -> Float[Array, " B"]:
    """x, but NaN in groups with a reward that is not finite.

    What is chosen by comparing hides such a reward: the largest of 1 and NaN is NaN, and it would
    be imitated. So it reaches the loss, and the update is skipped and counted.
    """
    finite = jnp.all(jnp.isfinite(jnp.reshape(rewards, (-1, group_size))), axis=1)
    return jnp.where(groups.repeat_groups(finite, group_size), x, jnp.nan)


def imitated(rewards: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """1 for the best of each group, the first of equal ones, and 0 for the others."""
    best = groups.best_of_group(rewards, group_size).astype(jnp.float32)
    return or_nan(best, rewards, group_size)


def policy_terms(
    output: CompletionOutput, experience: Experience, targets: Targets, surrogate: Surrogate
) -> tuple[dict[str, Term], Metrics]:
    """The terms of `ops.surrogate.Surrogate`, and metrics; gradients through `output` alone."""
    experience, targets = jax.lax.stop_gradient((experience, targets))
    mask = targets.mask
    (logprobs,) = filled(mask, output.logprobs)
    old_logprobs, ref_logprobs, advantages = filled(
        mask, experience.logprobs, experience.ref_logprobs, targets.advantages
    )
    policy, clipped, ratio = policy_loss(logprobs, old_logprobs, advantages, mask, surrogate)

    def mean(x):
        return aggregate(x, mask, surrogate.aggregate, constant=surrogate.constant)

    terms = {"policy": Term(weight=1.0, mean=mean(policy))}
    if surrogate.loss_kl:
        kl = kl_estimate(logprobs, ref_logprobs, surrogate.kl_estimator)
        if surrogate.kl_weighted:  # of each token, whatever ratio the surrogate clips
            kl = policy_ratio(logprobs, old_logprobs, mask, "token") * kl
        terms["kl"] = Term(weight=driven(experience, surrogate.loss_kl), mean=mean(kl))
    if surrogate.entropy_coef:
        (entropy,) = filled(mask, output.entropy)
        terms["entropy"] = Term(weight=-surrogate.entropy_coef, mean=mean(entropy))
    return terms, policy_metrics(output, clipped, ratio, mask)


def group_relative(
    surrogate: Surrogate,
    *,
    scale: str = "std",
    credit: str = "sequence",
) -> Algorithm:
    """An algorithm whose baseline is the mean of the group: GRPO and its descendants.

    credit "sequence": A_it = z(outcome_i + Σ_t process_it), the same at every token
    credit "steps":    A_it = z(outcome_i) + Σ over steps that end at t or later of z(process)

    z centres by the group's mean, over its completions or over all its steps, and with `scale`
    "std" divides by its standard deviation + 1e-6. Shao et al. 2024,
    https://arxiv.org/abs/2402.03300, sections 4.1.2 and 4.1.3.

    Args:
        surrogate: the values of the loss.
        scale: "std" or "none".
        credit: "sequence", or "steps": process scores at `step_ends` train what led to them.
    """
    check_surrogate(surrogate)
    for name, value, known in (("scale", scale, SCALES), ("credit", credit, CREDITS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")

    @jax.named_scope("group_targets")
    def targets(experience, group_size, state):
        mask, scores = experience.rollouts.mask, penalised_scores(experience, surrogate)
        rewards = sequence_rewards(scores, mask)
        if credit == "sequence":
            advantages = spread(_compared(rewards, group_size, scale), mask)
        else:
            ends = experience.rollouts.step_ends & mask
            advantages = _step_advantages(scores, mask, ends, group_size, scale)
        returns = spread(rewards, mask)
        return Targets(advantages=advantages, returns=returns, mask=jnp.asarray(mask)), state

    @jax.named_scope("group_loss")
    def loss(output, experience, targets, group_size):
        del group_size  # the comparison within groups is made; tokens are on their own now
        return policy_terms(output, experience, targets, surrogate)

    reference, process = surrogate.kl_coef != 0, credit == "steps"
    needs = Needs(reference=reference, process=process, min_group=2)
    made = Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs)
    return made._replace(kl_coef=drivable(surrogate.kl_coef))


def _compared(rewards, group_size, scale):
    """Each completion's reward beside those of its group."""
    if scale == "std":
        return groups.group_zscore(rewards, group_size)
    return rewards - groups.group_mean(rewards, group_size)


def _step_advantages(scores, mask, ends, group_size, scale):
    """The outcome beside its group, and what the steps from here on said beside all steps of it."""

    def centred(x, where):
        mean, std = groups.masked_group_stats(x, where, group_size)
        return (x - mean) / (std + 1e-6) if scale == "std" else x - mean

    (process,) = filled(ends, scores.process)
    steps = jnp.where(ends, centred(process, ends), 0.0)
    outcome = scores.outcome.astype(jnp.float32)[:, None]
    outcome = centred(outcome, jnp.ones(outcome.shape, bool))
    return jnp.where(mask, outcome + reward_to_go(steps, mask), 0.0)


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
