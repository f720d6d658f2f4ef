"""What a supervised step minimises: outputs of a mixture, and from them terms and metrics.

See `rlhf_jax.training.supervised` for the equations. Everything is a function of arrays and of an
`Objective`; state, optimizers and labels that move are there.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.models.completions import TextOutput, evaluate_texts, member_texts
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops import preference
from rlhf_jax.ops.advantage import Advantage
from rlhf_jax.ops.direct_preference import DirectPreference
from rlhf_jax.ops.ensemble import combine_members, disagreement
from rlhf_jax.ops.groups import split_chunks
from rlhf_jax.ops.masking import last_true, masked_sum, mean_of
from rlhf_jax.ops.odin import Odin
from rlhf_jax.ops.reward_metrics import pair_correct
from rlhf_jax.training import advantage, odin
from rlhf_jax.training.direct import (
    REFERENCE,
    compare,
    counted_tokens,
    direct_means,
    labelled_means,
)
from rlhf_jax.training.experience import constrain_rows
from rlhf_jax.types import Array, Labelled, Metrics, Mixture, Pairs, Steps, Term, Texts

Losses = tuple[dict[str, Term], Metrics]


class Objective(NamedTuple):
    """What a mixture is trained towards. ``own_rows``: each member of an ensemble has its own.
    ``direct``: pairs and labels train the LM head beside a frozen reference, and no scalar head."""

    model: Model
    sources: Mapping[str, float]
    role: str
    microbatches: int
    centre_coef: float
    outcome_head: str
    process_head: str
    own_rows: bool = False
    smoothing: float = 0.0
    heads: Mapping[str, str] = types.MappingProxyType({})  # of sources that have one of their own
    direct: DirectPreference | None = None
    joint: Advantage | Odin | None = None  # how heads that train together say one score

    def head(self, source: str, kind: type) -> str:
        """The head that a source of this kind trains."""
        return self.heads.get(source, self.process_head if kind is Steps else self.outcome_head)


def own_rows(config: ModelConfig) -> bool:
    """Whether each member of an ensemble trains on rows of its own; False for one model."""
    return config.ensemble in ("independent", "lora")


def chunks_of(objective, mixture):
    """The mixture, every source split into microbatches."""
    if mixture.keys() != objective.sources.keys():
        raise ValueError(
            f"the mixture has the sources {sorted(mixture)}; wanted {sorted(objective.sources)}"
        )
    group = objective.model.config.members if objective.own_rows else 1
    chunks = split_chunks(mixture, objective.microbatches, group)
    return constrain_rows(chunks, objective.model.rules, chunked=True)


def forward(objective, frozen, params, mixture):
    """The model's output for every source; of an ensemble, row i·E + e is member e's."""
    trees = (params[objective.role], frozen[objective.role])
    outputs = {}
    for name, rows in mixture.items():
        with jax.named_scope(name):
            if objective.direct and isinstance(rows, Pairs | Labelled):
                texts, reference = _texts(rows), frozen[REFERENCE]
                outputs[name] = compare(objective.model, *trees, reference, texts)
            elif isinstance(objective.joint, Odin) and isinstance(rows, Pairs):
                outputs[name] = odin.ask_odin(objective.model, *trees, _texts(rows))
            elif objective.model.config.members > 1:
                outputs[name] = _ask_members(objective, trees, rows)
            else:
                outputs[name] = evaluate_texts(objective.model, *trees, _texts(rows))
    return outputs


def whole_batch(objective, frozen, params, chunks):
    """What terms must know of the whole batch before a part of it has a gradient, by source.

    ODIN's correlations, from a pass without gradients; None where no term asks, or the batch is one
    part, whose own output says it.
    """
    if not isinstance(objective.joint, Odin) or objective.microbatches == 1:
        return None

    def read(chunk):
        outputs = forward(objective, frozen, params, chunk)
        return {name: odin.read_batch(outputs[name], _texts(rows)) for name, rows in chunk.items()}

    with jax.named_scope("whole_batch"):
        found = jax.lax.map(read, chunks)
        return {name: odin.batch_moments(one) for name, one in found.items()}


def _ask_members(objective, trees, rows):
    members = objective.model.config.members
    texts, sides = _texts(rows), 2 if isinstance(rows, Pairs) else 1

    def members_first(x):  # [M·E·sides S] -> [E M·sides S]
        x = jnp.moveaxis(jnp.reshape(x, (-1, members, sides, *x.shape[1:])), 1, 0)
        return jnp.reshape(x, (members, -1, *x.shape[3:]))

    def members_inside(x):  # [E M·sides S] -> [M·E·sides S]
        x = jnp.moveaxis(jnp.reshape(x, (members, -1, sides, *x.shape[2:])), 0, 1)
        return jnp.reshape(x, (-1, *x.shape[3:]))

    if objective.own_rows:
        texts = jax.tree.map(members_first, texts)
    scores = member_texts(objective.model, *trees, texts, own=objective.own_rows)
    return TextOutput(logprobs=None, scores=jax.tree.map(members_inside, scores))


def _rows_of_members(objective, rows):
    """Rows that lie like the members' outputs: each as often as there are members to read it."""
    members = objective.model.config.members
    if members == 1 or objective.own_rows:
        return rows
    return jax.tree.map(lambda x: jnp.repeat(x, members, axis=0), rows)


def _texts(rows) -> Texts:
    """The texts to forward. A pair's two become neighbours: rows stay on their devices."""
    match rows:
        case Texts():
            return rows
        case Pairs():
            return jax.tree.map(_interleave, rows.chosen, rows.rejected)
        case _:
            return rows.texts


def _interleave(chosen, rejected):
    """[M S], [M S] -> [2M S]."""
    both = jnp.stack([chosen, rejected], axis=1)
    return jnp.reshape(both, (2 * chosen.shape[0], *chosen.shape[1:]))


def losses(objective, outputs, mixture, whole=None) -> Losses:
    """Terms and metrics of all sources.

    Args:
        whole: see `whole_batch`.
    """
    terms, metrics = {}, {}
    sampled = advantage.samples_given(mixture)
    # A mean over members' rows that weighs E: the sum of the members' losses.
    copies = objective.model.config.members if objective.own_rows else 1
    for name, rows in mixture.items():
        rows = _rows_of_members(objective, rows)
        if isinstance(objective.joint, Odin):
            means, report = _odin_means(outputs[name], rows, whole and whole[name])
        else:
            means, report = _source_means(objective, name, outputs[name], rows, sampled)
        weight = objective.sources[name] * copies
        if "loss" in means:
            terms[name] = Term(weight=weight, mean=means["loss"])
        beside = {"centre": objective.centre_coef} | _joint_weights(objective.joint)
        beside |= {"nll": objective.direct.nll_coef} if objective.direct else {}
        for key, coef in beside.items():
            if key in means and coef:
                terms[f"{name}_{key}"] = Term(weight=weight * coef, mean=means[key])
        metrics |= {f"{name}/{key}": mean for key, mean in report.items()}
    return terms, metrics


def _joint_weights(joint):
    match joint:
        case Advantage():
            return advantage.weights(joint)
        case Odin():
            return odin.weights(joint)
        case _:
            return {}


def _odin_means(output, rows, found):
    if not isinstance(rows, Pairs):
        raise TypeError(f"a source holds {type(rows).__name__}; ODIN trains on Pairs alone")
    present = present_rows(rows.chosen) & present_rows(rows.rejected)
    return odin.odin_means(output, _texts(rows), rows, present, found)


def _source_means(objective, name, output, rows, sampled):
    """(losses, metrics) of one source, as means by name."""
    head = objective.head(name, type(rows))
    if isinstance(objective.joint, Advantage) and not isinstance(rows, Steps):
        return _advantage_means(
            objective.joint, output.scores, head_of(output, head), rows, sampled
        )
    match rows:
        case Texts():
            return {"loss": texts_mean(output, rows)}, {}
        case Pairs() if objective.direct:
            present = present_rows(rows.chosen) & present_rows(rows.rejected)
            return direct_means(objective.direct, output, _texts(rows), rows, present)
        case Pairs():
            return _pair_means(head_of(output, head), rows)
        case Labelled() if objective.direct:
            return labelled_means(objective.direct, output, rows, present_rows(rows.texts))
        case Labelled():
            return _labelled_means(head_of(output, head), rows)
        case Steps():
            return _step_means(head_of(output, head), rows)
        case _:
            raise TypeError(f"a source holds {type(rows).__name__}; known: {Mixture}")


def _advantage_means(values, scores, of_head, rows, sampled):
    """The usual terms of a source, where it has labels, and those of an advantage model."""
    texts = _texts(rows)
    by_text = last_scores(of_head, texts)
    match rows:
        case Pairs():
            means, report = _pair_means(of_head, rows)
            present = present_rows(rows.chosen) & present_rows(rows.rejected)
            more, said = advantage.pair_terms(
                values, scores, texts, by_text, rows.label, present, teaches=not sampled
            )
        case _:
            labelled = isinstance(rows, Labelled)
            means, report = _labelled_means(of_head, rows) if labelled else ({}, {})
            more, said = advantage.sample_terms(scores, texts, by_text, present_rows(texts))
    return means | more, report | said


def ensemble_metrics(objective, outputs, mixture) -> Metrics:
    """What members say together about pairs that all of them read."""
    metrics = {}
    for name, rows in mixture.items():
        if isinstance(rows, Pairs):
            scores = head_of(outputs[name], objective.head(name, Pairs))
            by_row = pair_differences(scores, _rows_of_members(objective, rows))
            by_member = jnp.reshape(by_row, (rows.label.shape[0], -1)).T  # [E M]
            mean = combine_members(by_member, "mean")
            right = pair_correct(mean, jnp.zeros_like(mean))
            right = jnp.where(rows.label > 0.5, right, 1 - right)
            present = present_rows(rows.chosen) & present_rows(rows.rejected)
            metrics |= {
                f"{name}/accuracy_of_mean": mean_of(right, present & (rows.label != 0.5)),
                f"{name}/disagreement": mean_of(disagreement(by_member), present),
            }
    return metrics


def texts_mean(output: TextOutput, rows: Texts):
    """−log p(token | past) over the tokens of `loss_mask`, as a token mean in nats.

    A row's first token has no past and never counts.
    """
    return mean_of(-output.logprobs, counted_tokens(rows))


def last_scores(scores: Float[Array, "M S"], texts: Texts) -> Float[Array, " M"]:
    """Each text's score at its last token; 0 for rows of padding."""
    return masked_sum(scores, last_true(texts.mask), axis=-1)


def _pair_means(scores, rows):
    by_pair = jnp.reshape(last_scores(scores, _texts(rows)), (-1, 2))
    chosen, rejected = by_pair[:, 0], by_pair[:, 1]
    present = present_rows(rows.chosen) & present_rows(rows.rejected)
    loss = preference.bradley_terry(chosen, rejected, label=rows.label, margin=rows.margin)
    right = pair_correct(chosen, rejected)
    right = jnp.where(rows.label > 0.5, right, 1 - right)
    losses = {
        "loss": mean_of(loss, present),
        "centre": mean_of(preference.centre(chosen, rejected), present),
    }
    return losses, {
        "accuracy": mean_of(right, present & (rows.label != 0.5)),
        "score_chosen": mean_of(chosen, present),
        "score_rejected": mean_of(rejected, present),
    }


def _labelled_means(scores, rows):
    score, present = last_scores(scores, rows.texts), present_rows(rows.texts)
    loss = mean_of(preference.correctness(score, rows.label), present)
    return {"loss": loss}, _accuracies(score, rows.label, present)


def _step_means(scores, rows):
    ends = rows.step_ends & rows.texts.mask
    loss = preference.step_cross_entropy(scores, rows.labels, ends)
    losses = {"loss": mean_of(loss, jnp.any(ends, axis=-1))}
    return losses, _accuracies(scores, rows.labels, ends)


def _accuracies(scores, labels, present):
    """How often "score > 0" agrees with "label > 1/2", over all and within either class."""
    positive = labels > 0.5
    agrees = (scores > 0) == positive
    return {
        "accuracy": mean_of(agrees, present),
        "accuracy_right": mean_of(agrees, present & positive),
        "accuracy_wrong": mean_of(agrees, present & ~positive),
    }


def first_rows(mixture: Mixture, count: Array | int) -> Mixture:
    """The mixture with its rows from `count` on as padding, which no loss and no metric counts."""

    def cut(texts):
        if not isinstance(texts, Texts):
            return texts
        kept = (jnp.arange(texts.mask.shape[0]) < count)[:, None]
        return dataclasses.replace(texts, mask=texts.mask & kept, loss_mask=texts.loss_mask & kept)

    return jax.tree.map(cut, mixture, is_leaf=lambda x: isinstance(x, Texts))


def present_rows(texts):
    """Rows that hold any token: the last batch of an evaluation is filled up with padding."""
    return jnp.any(texts.mask, axis=-1)


def head_of(output, name):
    if name not in output.scores:
        raise ValueError(f"the model has no head {name!r}; its heads: {sorted(output.scores)}")
    return output.scores[name]


def pair_differences(scores, rows):
    by_pair = jnp.reshape(last_scores(scores, _texts(rows)), (-1, 2))
    return by_pair[:, 0] - by_pair[:, 1]
