"""Pairs that train a quality and a length head together; see `rlhf_jax.ops.odin`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.models.completions import evaluate_texts, text_scores
from rlhf_jax.models.heads import LENGTH_HEAD, QUALITY_HEAD, is_odin
from rlhf_jax.models.lora import join
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops import preference
from rlhf_jax.ops.masking import masked_count, mean_of
from rlhf_jax.ops.odin import Moments, Odin, correlated, moments, overlap
from rlhf_jax.ops.reward_metrics import pair_correct
from rlhf_jax.pytree import pytree
from rlhf_jax.types import Array, Mean, Metrics, Pairs, Params, Texts

HEADS = (QUALITY_HEAD, LENGTH_HEAD)


@pytree
class OdinOutput:
    """What the heads say at each token, and |w_Q · w_L|, which the terms cannot see otherwise."""

    scores: dict[str, Float[Array, "M S"]]
    overlap: Float[Array, ""]


@pytree
class OdinMoments:
    """The moments of a whole batch, by head."""

    quality: Moments
    length: Moments


def check_odin(heads: tuple[str, ...], members: int) -> None:
    """Raises a ValueError for a model whose pairs cannot be explained by quality and length."""
    if not is_odin(heads):
        raise ValueError(f"ODIN trains the heads {HEADS}; the model has {heads}")
    if members > 1:
        raise ValueError(
            f"ODIN with {members} members: its correlations are those of one model; train one "
            "member, or take source option balance_lengths for an ensemble"
        )


def ask_odin(model: Model, params: Params, frozen: Params, texts: Texts) -> OdinOutput:
    """The forward pass."""
    heads = join(params, frozen)["heads"]
    return OdinOutput(
        scores=evaluate_texts(model, params, frozen, texts).scores,
        overlap=overlap(*(heads[name]["kernel"] for name in HEADS)),
    )


def _numbers(output: OdinOutput, texts: Texts) -> tuple[Array, Array, Array, Array]:
    """r_Q, r_L, tokens of the completion and presence of each text."""
    counted = masked_count(jnp.asarray(texts.loss_mask) & texts.mask, axis=-1)
    scores = (text_scores(output.scores, texts, name) for name in HEADS)
    return (*scores, counted, jnp.any(texts.mask, axis=-1))


def read_batch(output: OdinOutput, texts: Texts) -> Any:
    """What `batch_moments` needs of one part of a batch; no gradient goes through it."""
    return jax.lax.stop_gradient(_numbers(output, texts))


def batch_moments(read: Any) -> OdinMoments:
    """The moments of a batch from what `read_batch` gave of it, whole or in parts [parts M]."""
    quality, length, counted, present = (jnp.ravel(x) for x in read)
    return OdinMoments(
        quality=moments(quality, counted, present), length=moments(length, counted, present)
    )


def odin_means(
    output: OdinOutput,
    texts: Texts,
    rows: Pairs,
    present: Bool[Array, " M"],
    found: OdinMoments | None,
) -> tuple[dict[str, Mean], Metrics]:
    """(losses, metrics) of pairs, as means by name.

    Args:
        texts: both answers, those of a pair next to each other.
        present: the pairs that count.
        found: of the whole batch; None where `output` is all of it.
    """
    found = batch_moments(read_batch(output, texts)) if found is None else found
    quality, length, counted, there = _numbers(output, texts)
    both = jnp.reshape(quality + length, (-1, 2))
    chosen, rejected = both[:, 0], both[:, 1]
    loss = preference.bradley_terry(chosen, rejected, label=rows.label, margin=rows.margin)
    of_quality = correlated(found.quality, quality, counted)
    of_length = correlated(found.length, length, counted)
    size = jnp.sign(found.quality.correlation)[None] * of_quality
    pairs = masked_count(present)

    def right(of_pairs):
        correct = pair_correct(of_pairs[:, 0], of_pairs[:, 1])
        correct = jnp.where(rows.label > 0.5, correct, 1 - correct)
        return mean_of(correct, present & (rows.label != 0.5))

    alone = jnp.reshape(quality, (-1, 2))
    losses = {
        "loss": mean_of(loss, present),
        "centre": mean_of(preference.centre(chosen, rejected), present),
        "length": mean_of(size - of_length, there),
        "overlap": Mean(total=output.overlap * pairs, count=pairs),
    }
    return losses, {
        "accuracy": right(alone),
        "accuracy_with_length": right(both),
        "score_chosen": mean_of(alone[:, 0], present),
        "score_rejected": mean_of(alone[:, 1], present),
        "quality_correlation": mean_of(of_quality, there),
        "length_correlation": mean_of(of_length, there),
    }


def weights(values: Odin) -> dict[str, float | int]:
    """The weights of the terms by name."""
    return {"length": values.length_coef, "overlap": values.orthogonal_coef}
