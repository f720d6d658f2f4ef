"""Supervised steps: fine-tuning on texts, and reward models from pairs, correctness and steps.

One step minimises a weighted mixture of sources, each normalised by what it itself holds:

    L = Σ_sources w · L_source
    Texts     token mean of  −log p(token | past)                   over `loss_mask`
    Pairs     mean of  −[p log σ(d − m) + (1 − p) log σ(−d − m)],   d = r_chosen − r_rejected
    Labelled  mean of  −[z log σ(r) + (1 − z) log σ(−r)]
    Steps     mean over solutions of the mean cross-entropy at their step ends

With `direct` (`rlhf_jax.ops.direct_preference`) pairs train a policy without scores: d is then made
of its log-probs and those of its reference, and the table there says what the loss is of it. Labels
do as well: r is then β log π/π_ref of the text.

r is the outcome head at a text's last token, and at step ends the process head. So a batch with
few labelled steps does not drown them, and doubling the rows of one source leaves the others'
gradient alone. One trunk serves all sources; give both heads one name to share the head too, or
give a source a head of its own (`heads`): groups of annotators that disagree are then not averaged.

An ensemble trains in the same step. Members with parameters all their own ("independent", "lora")
draw rows of their own too, row i·E + e being member e's, and the loss is the sum of theirs, so each
goes the way it would go alone, but for the clip of the common gradient's norm. Members on one trunk
("linear") read the same rows, and the loss is the mean of theirs.

With `joint` several heads train together and say one score: an advantage model bounds scores and
learns what is expected of a prompt, ODIN keeps length out of quality; see `rlhf_jax.ops.advantage`
and `rlhf_jax.ops.odin`.

With `smoothing` β the label of a pair follows the model whenever the pair was drawn, once an epoch:
p ← (1 − β) p + β σ(d), d after the update (iterative data smoothing, `rlhf_jax.ops.smoothing`). The
labels are a part of the state.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import is_advantage
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.advantage import Advantage
from rlhf_jax.ops.direct_preference import DirectPreference
from rlhf_jax.ops.groups import join_chunks, split_chunks
from rlhf_jax.ops.masking import mean_of
from rlhf_jax.ops.metrics import single
from rlhf_jax.ops.odin import Odin
from rlhf_jax.ops.smoothing import smooth_label
from rlhf_jax.training.experience import constrain_rows
from rlhf_jax.training.gradients import Carry, Problem, descend, gradient_sharding, union
from rlhf_jax.training.objective import (
    Objective,
    chunks_of,
    ensemble_metrics,
    forward,
    head_of,
    last_scores,
    losses,
    own_rows,
    pair_differences,
    present_rows,
    whole_batch,
)
from rlhf_jax.training.odin import check_odin
from rlhf_jax.training.state import create_train_state
from rlhf_jax.types import Array, Metrics, Mixture, Pairs, Params, TrainState

__all__ = [
    "Joint",
    "check_joint",
    "check_smoothing",
    "create_supervised_state",
    "label_tables",
    "last_scores",
    "make_supervised_evaluate",
    "make_supervised_step",
    "own_rows",
]

Frozen = Mapping[str, Params]
Joint = Advantage | Odin


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
    smoothing: float = 0.0,
    heads: Mapping[str, str] | None = None,
    direct: DirectPreference | None = None,
    joint: Joint | None = None,
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
        smoothing: β of a label's step towards the model, 0 = labels stay; with it the state has
            `label_tables`, ``<source>/label_moved`` is how far labels are from those given, and
            ``/accuracy`` in training is that on the labels of now.
        heads: the head of a source by name, in place of the two above.
        direct: pairs and labels train the LM head by this loss, beside ``frozen["reference"]``, the
            whole tree of the model without adapters; they have no scores and need no scalar head.
        joint: heads that train together: an advantage model (`rlhf_jax.ops.advantage`), for which
            texts are sampled answers, or ODIN (`rlhf_jax.ops.odin`), which trains on pairs alone.

    Raises:
        ValueError: no source, bad sizes, or labels that follow a model without scores; at tracing
            for a mixture of other sources, or for a head that the model lacks.
    """
    objective = _objective(
        model, sources, role, microbatches, centre_coef, outcome_head, process_head
    )._replace(
        own_rows=own_rows(model.config),
        smoothing=check_smoothing(model.config, smoothing, joint),
        heads=heads or {},
        direct=direct,
        joint=check_joint(model.config, joint),
    )
    if direct and smoothing:
        raise ValueError(f"smoothing={smoothing}: labels follow scores, and a policy gives none")

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
    heads: Mapping[str, str] | None = None,
    direct: DirectPreference | None = None,
    joint: Joint | None = None,
) -> Callable[[Mapping[str, Params], Frozen, Mixture], Metrics]:
    """A pure function (params, frozen, mixture) -> metrics, without gradients.

    ``loss/<source>`` in nats, per token (Texts), pair, text or solution;
    Pairs: ``<source>/accuracy`` (ties half, undecided labels left out), ``/score_chosen``,
    ``/score_rejected``; Labelled and Steps: ``/accuracy`` of "score > 0" per text or step, and
    the same among the right (``/accuracy_right``) and the wrong ones (``/accuracy_wrong``).
    All are means with counts: add them over batches. All members of an ensemble read the same
    rows, and the above are means over members too; Pairs also give ``/accuracy_of_mean``, that of
    their mean score, and ``/disagreement``, the standard deviation of d over members.

    With `direct` Pairs give ``/accuracy`` (how often the better answer has the higher implicit
    reward β log π/π_ref), ``/reward_chosen``, ``/reward_rejected``, ``/reward_margin`` (their
    difference), and ``/logprob_chosen`` and ``/logprob_rejected`` of whole answers, in nats;
    Labelled the three accuracies of "implicit reward > 0", and ``/reward_right``,
    ``/reward_wrong``, ``/logprob_right`` and ``/logprob_wrong``.

    With `joint` Pairs of an advantage model also give ``/expected``, the mean of e(x), and sampled
    texts that and ``/score``; its ``/score_...`` are r. Those of ODIN give ``/accuracy`` and scores
    of the quality head, ``/accuracy_with_length`` of the sum of both, and ``/quality_correlation``
    and ``/length_correlation``, those of a head with the number of tokens within a batch. Their
    further terms are ``loss/<source>_...``.
    """
    objective = _objective(
        model, sources, role, microbatches, 0.0, outcome_head, process_head
    )._replace(heads=heads or {}, direct=direct, joint=check_joint(model.config, joint))

    def supervised_evaluate(params, frozen, mixture):
        return _evaluate(objective, params, frozen, mixture)

    return supervised_evaluate


def create_supervised_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    role: str = "policy",
    init: Callable[[], Any] = lambda: (),
) -> TrainState:
    """The state of a supervised run: one role. Parameters are copied.

    Args:
        init: gives `label_tables` for a run that smooths labels, else nothing.
    """
    return create_train_state({role: params}, {role: optimizer}, init, mesh)


def label_tables(records: Mapping[str, int]) -> dict[str, Float[Array, " R"]]:
    """The labels of a run that smooths them, by source of pairs: NaN where none was drawn yet.

    Args:
        records: how many each source has; `Pairs.record` is below.
    """
    return {name: jnp.full((total,), jnp.nan, jnp.float32) for name, total in records.items()}


def check_smoothing(model: ModelConfig, smoothing: float, joint: Joint | None = None) -> float:
    """The given β; a ValueError if it is no share, or labels would follow an ensemble, or ODIN."""
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing}; wanted 0 (off) to 1, such as 0.1")
    if smoothing and model.members > 1:
        raise ValueError(
            f"smoothing={smoothing} with {model.members} members: labels follow one model; "
            "set smoothing to 0, or train one member"
        )
    if smoothing and isinstance(joint, Odin):
        raise ValueError(f"smoothing={smoothing}: labels follow one head, and ODIN has two")
    return smoothing


def check_joint(model: ModelConfig, joint: Joint | None) -> Joint | None:
    """The given form; a ValueError if the model cannot have it."""
    if isinstance(joint, Odin):
        check_odin(model.score_heads, model.members)
    if isinstance(joint, Advantage) and not is_advantage(model.score_heads):
        raise ValueError(
            "an advantage model has the heads 'outcome' and 'expected'; the model has "
            f"{model.score_heads}"
        )
    return joint


def _objective(model, sources, role, microbatches, centre_coef, outcome_head, process_head):
    if not sources:
        raise ValueError("sources is empty; name at least one source with its weight")
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches}; wanted 1 or more")
    return Objective(
        model, dict(sources), role, microbatches, centre_coef, outcome_head, process_head
    )


def _train(objective, optimizers, state, frozen, mixture):
    given, tables = mixture, state.algorithm
    if objective.smoothing:
        mixture = given | {name: _with_label(given[name], table) for name, table in tables.items()}
    carry = Carry(dict(state.params), dict(state.opt_state), state.skipped, state.lr_scale)
    chunks = chunks_of(objective, mixture)
    problem = Problem(
        functools.partial(forward, objective, frozen),
        functools.partial(
            losses, objective, whole=whole_batch(objective, frozen, carry.params, chunks)
        ),
        gradient_sharding({objective.role: objective.model}),
    )
    carry, metrics = descend(problem, optimizers, carry, chunks)
    if objective.smoothing:
        with jax.named_scope("smooth_labels"):
            tables = _moved(objective, frozen, carry.params, mixture, tables)
        moved = {
            f"{name}/label_moved": mean_of(
                jnp.abs(table[given[name].record] - given[name].label),
                present_rows(given[name].chosen),
            )
            for name, table in tables.items()
        }
        metrics = union(metrics, moved)
    state = TrainState(
        step=state.step + 1,
        params=carry.params,
        opt_state=carry.opt_state,
        algorithm=tables,
        skipped=carry.skipped,
        lr_scale=carry.lr_scale,
    )
    in_row = single(carry.skipped.astype(jnp.float32))
    return state, metrics | {"update/skipped_in_row": in_row}


def _with_label(rows, table):
    """Pairs with the labels of the table, and their own where it has none yet."""
    known = table[rows.record]
    return dataclasses.replace(rows, label=jnp.where(jnp.isnan(known), rows.label, known))


def _moved(objective, frozen, params, mixture, tables):
    """The tables after every label of the mixture made its step towards the model.

    A record that was drawn twice has the same label and the same score twice, and one new label.
    """

    def differences(chunk):
        outputs = forward(objective, frozen, params, chunk)
        return {
            name: pair_differences(head_of(outputs[name], objective.head(name, Pairs)), rows)
            for name, rows in chunk.items()
        }

    pairs = {name: mixture[name] for name in tables}
    chunks = constrain_rows(
        split_chunks(pairs, objective.microbatches), objective.model.rules, chunked=True
    )
    found = join_chunks(jax.lax.map(differences, chunks))
    return {
        name: table.at[pairs[name].record].set(
            smooth_label(pairs[name].label, found[name], objective.smoothing)
        )
        for name, table in tables.items()
    }


def _evaluate(objective, params, frozen, mixture):
    def evaluate(chunk):
        outputs = forward(objective, frozen, params, chunk)
        terms, metrics = losses(objective, outputs, chunk)
        if objective.model.config.members > 1:
            metrics = union(metrics, ensemble_metrics(objective, outputs, chunk))
        return union({f"loss/{name}": term.mean for name, term in terms.items()}, metrics)

    metrics = jax.lax.map(evaluate, chunks_of(objective, mixture))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
