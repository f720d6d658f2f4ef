"""Supervised steps: fine-tuning on texts, and reward models from pairs, correctness and steps.

One step minimises a weighted mixture of sources, each normalised by what it itself holds:

    L = Σ_sources w · L_source
    Texts     token mean of  −log p(token | past)                   over `loss_mask`
    Pairs     mean of  −[p log σ(d − m) + (1 − p) log σ(−d − m)],   d = r_chosen − r_rejected
    Labelled  mean of  −[z log σ(r) + (1 − z) log σ(−r)]
    Steps     mean over solutions of the mean cross-entropy at their step ends

r is the outcome head at a text's last token, and at step ends the process head. So a batch with
few labelled steps does not drown them, and doubling the rows of one source leaves the others'
gradient alone. One trunk serves all sources; give both heads one name to share the head too.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from rlhf_jax.models.completions import TextOutput, evaluate_texts
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops import preference
from rlhf_jax.ops.groups import split_chunks
from rlhf_jax.ops.masking import last_true, masked_sum, mean_of
from rlhf_jax.ops.metrics import single
from rlhf_jax.ops.reward_metrics import pair_correct
from rlhf_jax.training.experience import constrain_rows
from rlhf_jax.training.gradients import Carry, Problem, descend, gradient_sharding, union
from rlhf_jax.training.state import create_train_state
from rlhf_jax.types import (
    Array,
    Labelled,
    Metrics,
    Mixture,
    Pairs,
    Params,
    Steps,
    Term,
    Texts,
    TrainState,
)

Frozen = Mapping[str, Params]
Losses = tuple[dict[str, Term], Metrics]


class Objective(NamedTuple):
    """What a mixture is trained towards."""

    model: Model
    sources: Mapping[str, float]
    role: str
    microbatches: int
    centre_coef: float
    outcome_head: str
    process_head: str


def make_supervised_step(
    model: Model,
    sources: Mapping[str, float],
    optimizer: optax.GradientTransformation,
    *,
    role: str = "policy",
    microbatches: int = 1,
    centre_coef: float = 0.0,
    outcome_head: str = "outcome",
    process_head: str = "process",
) -> Callable[[TrainState, Frozen, Mixture, jax.Array], tuple[TrainState, Metrics]]:
    """A pure function (state, frozen, mixture, key) -> (state, metrics); nothing in it is random.

    Compile it with `update.compile_update`. An update that is not finite is skipped and counted.
    Metrics: ``loss/<source>`` unweighted, ``<source>/...`` as in `make_supervised_evaluate`,
    ``update/loss``, ``update/skipped``, ``update/terms_empty``, ``<role>/grad_norm``.

    Args:
        model: the network; ``frozen[role]`` holds what of it does not train ({} if all does).
        sources: weight of each source of the mixture by name.
        role: the state's role that trains.
        microbatches: parts in which the gradient is computed; must divide every source's rows.
        centre_coef: weight of (r_chosen + r_rejected)² beside each source of pairs.
        outcome_head: head that scores whole texts.
        process_head: head that scores steps.

    Raises:
        ValueError: no source, or bad sizes; at tracing for a mixture of other sources, or for a
            head that the model lacks.
    """
    objective = _objective(
        model, sources, role, microbatches, centre_coef, outcome_head, process_head
    )

    def supervised_step(state, frozen, mixture, key):
        del key  # the signature of all updates
        return _train(objective, {role: optimizer}, state, frozen, mixture)

    return supervised_step


def make_supervised_evaluate(
    model: Model,
    sources: Mapping[str, float],
    *,
    role: str = "policy",
    microbatches: int = 1,
    outcome_head: str = "outcome",
    process_head: str = "process",
) -> Callable[[Mapping[str, Params], Frozen, Mixture], Metrics]:
    """A pure function (params, frozen, mixture) -> metrics, without gradients.

    ``loss/<source>`` in nats, per token (Texts), pair, text or solution;
    Pairs: ``<source>/accuracy`` (ties half, undecided labels left out), ``/score_chosen``,
    ``/score_rejected``; Labelled and Steps: ``/accuracy`` of "score > 0" per text or step, and
    the same among the right (``/accuracy_right``) and the wrong ones (``/accuracy_wrong``).
    All are means with counts: add them over batches.
    """
    objective = _objective(model, sources, role, microbatches, 0.0, outcome_head, process_head)

    def supervised_evaluate(params, frozen, mixture):
        return _evaluate(objective, params, frozen, mixture)

    return supervised_evaluate


def create_supervised_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, *, role: str = "policy"
) -> TrainState:
    """The state of a supervised run: one role, no algorithm. Parameters are copied."""
    return create_train_state({role: params}, {role: optimizer}, lambda: (), mesh)


def _objective(model, sources, role, microbatches, centre_coef, outcome_head, process_head):
    if not sources:
        raise ValueError("sources is empty; name at least one source with its weight")
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches}; wanted 1 or more")
    return Objective(
        model, dict(sources), role, microbatches, centre_coef, outcome_head, process_head
    )


def _train(objective, optimizers, state, frozen, mixture):
    problem = Problem(
        functools.partial(_forward, objective, frozen),
        functools.partial(_loss, objective),
        gradient_sharding({objective.role: objective.model}),
    )
    carry = Carry(dict(state.params), dict(state.opt_state), state.skipped)
    carry, metrics = descend(problem, optimizers, carry, _chunks(objective, mixture))
    state = TrainState(
        step=state.step + 1,
        params=carry.params,
        opt_state=carry.opt_state,
        algorithm=state.algorithm,
        skipped=carry.skipped,
    )
    in_row = single(carry.skipped.astype(jnp.float32))
    return state, metrics | {"update/skipped_in_row": in_row}


def _evaluate(objective, params, frozen, mixture):
    def evaluate(chunk):
        terms, metrics = _loss(objective, _forward(objective, frozen, params, chunk), chunk)
        return union({f"loss/{name}": term.mean for name, term in terms.items()}, metrics)

    metrics = jax.lax.map(evaluate, _chunks(objective, mixture))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)


def _chunks(objective, mixture):
    """The mixture, every source split into microbatches."""
    if mixture.keys() != objective.sources.keys():
        raise ValueError(
            f"the mixture has the sources {sorted(mixture)}; wanted {sorted(objective.sources)}"
        )
    chunks = split_chunks(mixture, objective.microbatches)
    return constrain_rows(chunks, objective.model.rules, chunked=True)


def _forward(objective, frozen, params, mixture):
    """The model's output for every source."""

    def run(texts):
        role = objective.role
        return evaluate_texts(objective.model, params[role], frozen[role], texts)

    outputs = {}
    for name, rows in mixture.items():
        with jax.named_scope(name):
            outputs[name] = run(_texts(rows))
    return outputs


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


def _loss(objective, outputs, mixture) -> Losses:
    """Terms and metrics of all sources."""
    terms, metrics = {}, {}
    for name, rows in mixture.items():
        means, report = _source_means(objective, outputs[name], rows)
        weight = objective.sources[name]
        terms[name] = Term(weight=weight, mean=means["loss"])
        if "centre" in means and objective.centre_coef:
            centre_weight = weight * objective.centre_coef
            terms[f"{name}_centre"] = Term(weight=centre_weight, mean=means["centre"])
        metrics |= {f"{name}/{key}": mean for key, mean in report.items()}
    return terms, metrics


def _source_means(objective, output, rows):
    """(losses, metrics) of one source, as means by name."""
    match rows:
        case Texts():
            return {"loss": texts_mean(output, rows)}, {}
        case Pairs():
            return _pair_means(_head(output, objective.outcome_head), rows)
        case Labelled():
            return _labelled_means(_head(output, objective.outcome_head), rows)
        case Steps():
            return _step_means(_head(output, objective.process_head), rows)
        case _:
            raise TypeError(f"a source holds {type(rows).__name__}; known: {Mixture}")


def texts_mean(output: TextOutput, rows: Texts):
    """−log p(token | past) over the tokens of `loss_mask`, as a token mean in nats.

    A row's first token has no past and never counts.
    """
    column = jax.lax.broadcasted_iota(jnp.int32, rows.mask.shape, 1)
    return mean_of(-output.logprobs, rows.loss_mask & rows.mask & (column > 0))


def last_scores(scores: Float[Array, "M S"], texts: Texts) -> Float[Array, " M"]:
    """Each text's score at its last token; 0 for rows of padding."""
    return masked_sum(scores, last_true(texts.mask), axis=-1)


def _pair_means(scores, rows):
    by_pair = jnp.reshape(last_scores(scores, _texts(rows)), (-1, 2))
    chosen, rejected = by_pair[:, 0], by_pair[:, 1]
    present = _present(rows.chosen) & _present(rows.rejected)
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
    score, present = last_scores(scores, rows.texts), _present(rows.texts)
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


def _present(texts):
    """Rows that hold any token: the last batch of an evaluation is filled up with padding."""
    return jnp.any(texts.mask, axis=-1)


def _head(output, name):
    if name not in output.scores:
        raise ValueError(f"the model has no head {name!r}; its heads: {sorted(output.scores)}")
    return output.scores[name]
