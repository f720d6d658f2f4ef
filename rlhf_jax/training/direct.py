"""Pairs and labels that train a policy without a reward model: it beside its reference.

The reference is the frozen model that the policy started from. Its log-probs are computed in the
step that needs them, on the same rows in the same chunks: nothing to precompute, keep or restore,
held-out data too, and a policy that is still its reference differs from it by exactly 0. The price
is one forward pass more. Under adapters it is the policy's own base without them, and no second
copy of anything; see `rlhf_jax.ops.direct_preference` for the losses.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import Model, decoder
from rlhf_jax.ops.direct_preference import (
    Answers,
    DirectPreference,
    answer_nll,
    answers,
    direct_loss,
    implicit_correctness,
    implicit_reward,
)
from rlhf_jax.ops.masking import mean_of
from rlhf_jax.ops.reward_metrics import pair_correct
from rlhf_jax.pytree import pytree
from rlhf_jax.types import Array, Labelled, Mean, Metrics, Pairs, Params, Texts

REFERENCE = "reference"  # the tree of the reference in what a step gets as frozen


@pytree
class Compared:
    """Log-probs of the same texts by a policy and by its reference; 0 at padding."""

    logprobs: Float[Array, "M S"]
    reference: Float[Array, "M S"]


def reference_config(policy: ModelConfig) -> ModelConfig:
    """The reference is the policy without adapters."""
    return dataclasses.replace(policy, lora_rank=0)


def compare(
    model: Model, params: Params, frozen: Params, reference: Params, texts: Texts
) -> Compared:
    """What a policy and its reference say of texts. No gradient goes into the reference.

    Args:
        params, frozen: the policy's trainable and frozen part.
        reference: the whole tree of the model without adapters.
    """
    policy = evaluate_texts(model, params, frozen, texts)
    with jax.named_scope("reference"):
        plain = decoder(reference_config(model.config), model.rules)
        before = evaluate_texts(plain, reference, {}, texts)
    return Compared(logprobs=policy.logprobs, reference=jax.lax.stop_gradient(before.logprobs))


def counted_tokens(texts: Texts) -> Bool[Array, "M S"]:
    """The tokens whose log-probs count. A row's first token has no past and never does."""
    column = jax.lax.broadcasted_iota(jnp.int32, texts.mask.shape, 1)
    return texts.loss_mask & texts.mask & (column > 0)


def direct_means(
    values: DirectPreference,
    output: Compared,
    texts: Texts,
    rows: Pairs,
    present: Bool[Array, " M"],
) -> tuple[dict[str, Mean], Metrics]:
    """(losses, metrics) of pairs, as means by name.

    Args:
        output, texts: of both answers, those of a pair next to each other.
        present: the pairs that count.
    """
    both = answers(values, output.logprobs, output.reference, counted_tokens(texts))
    by_pair = [jnp.reshape(x, (-1, 2)) for x in both]
    chosen, rejected = (Answers(*(x[:, side] for x in by_pair)) for side in (0, 1))
    loss = direct_loss(values, chosen, rejected, label=rows.label, margin=rows.margin)
    nll = answer_nll(chosen, rejected, label=rows.label)
    rewards = [implicit_reward(values, one) for one in (chosen, rejected)]
    right = pair_correct(*rewards)
    right = jnp.where(rows.label > 0.5, right, 1 - right)
    losses = {"loss": mean_of(loss, present), "nll": mean_of(nll, present)}
    return losses, {
        "accuracy": mean_of(right, present & (rows.label != 0.5)),
        "reward_chosen": mean_of(rewards[0], present),
        "reward_rejected": mean_of(rewards[1], present),
        "reward_margin": mean_of(rewards[0] - rewards[1], present),
        "logprob_chosen": mean_of(chosen.logprob, present),
        "logprob_rejected": mean_of(rejected.logprob, present),
    }


def labelled_means(
    values: DirectPreference,
    output: Compared,
    rows: Labelled,
    present: Bool[Array, " M"],
) -> tuple[dict[str, Mean], Metrics]:
    """(losses, metrics) of answers that are right or wrong, as means by name.

    Args:
        present: the answers that count.
    """
    both = answers(values, output.logprobs, output.reference, counted_tokens(rows.texts))
    loss = implicit_correctness(values, both, label=rows.label)
    reward = implicit_reward(values, both)
    right = present & (rows.label > 0.5)
    wrong = present & (rows.label <= 0.5)
    agrees = (reward > 0) == (rows.label > 0.5)
    return {"loss": mean_of(loss, present)}, {
        "accuracy": mean_of(agrees, present),
        "accuracy_right": mean_of(agrees, right),
        "accuracy_wrong": mean_of(agrees, wrong),
        "reward_right": mean_of(reward, right),
        "reward_wrong": mean_of(reward, wrong),
        "logprob_right": mean_of(both.logprob, right),
        "logprob_wrong": mean_of(both.logprob, wrong),
    }
