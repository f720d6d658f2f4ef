"""The update: epochs x minibatches x microbatches of any algorithm in one compiled program.

    targets                        once, from the whole batch
    for each epoch                 permute the groups
      for each minibatch           count what every term's mean divides by
        for each microbatch        gradients of  Σ weight · total / count,  added up in float32
        apply                      one optimizer step per role, unless something is not finite

Minibatches and microbatches are whole groups; the innermost two lines are `gradients.descend`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from rlhf_jax.models.completions import evaluate_completions, evaluate_texts
from rlhf_jax.ops.groups import split_chunks
from rlhf_jax.ops.masking import masked_var, mean_of
from rlhf_jax.ops.metrics import single
from rlhf_jax.ops.surrogate import filled
from rlhf_jax.training.experience import (
    COMPILER_OPTIONS,
    constrain_rows,
    exact_options,
    on_mesh,
)
from rlhf_jax.training.gradients import (
    Carry,
    Optimizers,
    Problem,
    choose,
    descend,
    gradient_sharding,
    union,
)
from rlhf_jax.training.state import Models, check_roles, trained_models
from rlhf_jax.types import (
    Algorithm,
    Array,
    CompletionOutput,
    Experience,
    Mean,
    Metrics,
    Params,
    Targets,
    TrainState,
)

Frozen = Mapping[str, Params]
UpdateStep = Callable[[TrainState, Frozen, Experience, jax.Array], tuple[TrainState, Metrics]]


class Batch(NamedTuple):
    """What is permuted and split together."""

    experience: Experience
    targets: Targets


class Plan(NamedTuple):
    """What an update step is built from."""

    models: Models
    algorithm: Algorithm
    optimizers: Optimizers
    epochs: int
    minibatches: int
    microbatches: int
    temperature: Float[Array, ""] | float
    group_size: int


def make_update_step(
    models: Models,
    algorithm: Algorithm,
    optimizers: Optimizers,
    *,
    epochs: int,
    minibatches: int,
    microbatches: int,
    temperature: Float[Array, ""] | float,
    group_size: int,
) -> UpdateStep:
    """A pure function (state, frozen, experience, key) -> (state, metrics).

    Groups are permuted anew in every epoch, with ``fold_in(key, epoch)``; a single pass over a
    single minibatch is not permuted, since the order could not matter. A minibatch whose loss or
    gradient is not finite leaves parameters and optimizers as they were.

    Metrics, besides the algorithm's own: ``update/loss``, ``update/skipped`` (share of
    minibatches), ``update/skipped_in_row`` (minibatches, up to now), ``update/terms_empty``
    (terms without anything to average, per minibatch), ``update/first_logprob_gap`` (nats per
    token between the first minibatch and `Experience.logprobs`; 0 where those were evaluated in
    chunks of one microbatch), ``loss/<term>`` unweighted, ``<role>/grad_norm`` before clipping.

    Args:
        epochs: passes over the batch.
        minibatches: optimizer steps per epoch.
        microbatches: parts in which a minibatch's gradient is computed.
        temperature: the sampling temperature.
        group_size: K, rows per prompt.

    Raises:
        ValueError: at build for impossible arguments; at tracing for a batch that does not
            split into whole groups, or without the extra rows that the algorithm names.
    """
    plan = plan_update(
        models,
        algorithm,
        optimizers,
        temperature=temperature,
        epochs=epochs,
        minibatches=minibatches,
        microbatches=microbatches,
        group_size=group_size,
    )

    def update_step(state, frozen, experience, key):
        return _update(plan, state, frozen, experience, key)

    return update_step


def plan_update(
    models: Models,
    algorithm: Algorithm,
    optimizers: Optimizers,
    *,
    temperature: Float[Array, ""] | float,
    **sizes: int,
) -> Plan:
    """The `Plan` of `make_update_step`'s arguments; a ValueError for impossible ones."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}; wanted 1 or more")
    if sizes["group_size"] < algorithm.needs.min_group:
        raise ValueError(
            f"group_size={sizes['group_size']}; the algorithm needs {algorithm.needs.min_group} or "
            "more"
        )
    check_roles(models, optimizers, algorithm.needs)
    return Plan(models, algorithm, optimizers, temperature=temperature, **sizes)


def compile_update(
    step: UpdateStep, state: TrainState, mesh: Mesh, *, exact: bool = True
) -> UpdateStep:
    """Compiles an update (or supervised) step; call it under ``jax.set_mesh(mesh)``.

    The state is donated and comes back with the shardings it had, so one compilation serves all
    calls. ``state`` gives the shardings; arrays or ShapeDtypeStructs.

    Args:
        exact: two passes over the same rows round alike (`exact_options`): the first ratio is
            exactly 1, and so is that to the reference that the policy began as. Steps that
            compare nothing save what it costs.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        on_mesh(step, mesh),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        compiler_options=exact_options(mesh) if exact else COMPILER_OPTIONS,
    )


def _update(
    plan: Plan, state: TrainState, frozen: Frozen, experience: Experience, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """All epochs of one batch of experience."""
    check_batch(plan, experience)
    with jax.named_scope("targets"):
        targets, algorithm_state = plan.algorithm.targets(
            experience, plan.group_size, state.algorithm
        )
    # Gradients flow through the model's output alone.
    batch = jax.lax.stop_gradient(Batch(experience, targets))
    problem = policy_problem(plan, frozen)
    carry, metrics = run_epochs(plan, problem, carry_of(state), batch, key)
    first = jax.tree.map(lambda x: x[0, 0], metrics.pop("update/first_logprob_gap"))
    metrics = jax.tree.map(lambda x: jnp.sum(x, axis=(0, 1)), metrics)
    metrics |= {"update/first_logprob_gap": first} | batch_report(plan, carry, batch)
    return after_update(state, carry, algorithm_state), metrics


def carry_of(state: TrainState) -> Carry:
    """What the first minibatch starts from."""
    return Carry(dict(state.params), dict(state.opt_state), state.skipped, state.lr_scale)


def after_update(state: TrainState, carry: Carry, algorithm_state: Any) -> TrainState:
    """The state after one batch: what its minibatches made, and what its targets remember."""
    return TrainState(
        step=state.step + 1,
        params=carry.params,
        opt_state=carry.opt_state,
        algorithm=_keep_finite(algorithm_state, state.algorithm),
        skipped=carry.skipped,
        lr_scale=carry.lr_scale,
    )


def batch_report(plan: Plan, carry: Carry, batch: Batch) -> Metrics:
    """What is said once of a batch, and not of each of its minibatches."""
    metrics = {"update/skipped_in_row": single(carry.skipped.astype(jnp.float32))}
    if plan.algorithm.needs.value:
        metrics["value/explained_variance"] = explained_variance(*batch)
    return metrics


def run_epochs(
    plan: Plan, problem: Problem, carry: Carry, batch: Batch, key: jax.Array
) -> tuple[Carry, Metrics]:
    """All epochs of a batch; the roles of ``carry`` train. Metrics are [epochs, minibatches]."""
    # The only leaf without rows to permute and split: it joins every microbatch again.
    kl_coef = batch.experience.kl_coef
    batch = batch._replace(experience=dataclasses.replace(batch.experience, kl_coef=None))

    def loss(output, chunk):
        experience = dataclasses.replace(chunk.experience, kl_coef=kl_coef)
        return problem.loss(output, chunk._replace(experience=experience))

    joined = problem._replace(loss=loss)
    shuffles = plan.epochs * plan.minibatches > 1

    def run_epoch(carry, epoch):
        rows = batch
        if shuffles:
            rows = permute_groups(batch, jax.random.fold_in(key, epoch), plan.group_size)
            rows = constrain_rows(rows, plan.models.policy.rules)
        chunks = split_groups(rows, plan.minibatches, plan.group_size)
        return jax.lax.scan(functools.partial(_run_minibatch, plan, joined), carry, chunks)

    return jax.lax.scan(run_epoch, carry, jnp.arange(plan.epochs))


def explained_variance(experience: Experience, targets: Targets) -> Mean:
    """1 − Var(R − V) / Var(R) over the tokens that train, of the whole batch, before the update.

    1: the critic knows the returns; 0: no better than their mean; below 0: worse. 0 where returns
    are all equal.
    """
    mask = targets.mask
    returns, values = filled(mask, targets.returns, experience.values)
    spread = masked_var(returns, mask)
    varies = spread > 0
    share = masked_var(returns - values, mask) / jnp.where(varies, spread, 1.0)
    return single(jnp.where(varies, 1.0 - share, 0.0))


def _run_minibatch(
    plan: Plan, problem: Problem, carry: Carry, minibatch: Batch
) -> tuple[Carry, Metrics]:
    """One optimizer step."""
    chunks = split_groups(minibatch, plan.microbatches, plan.group_size)
    chunks = constrain_rows(chunks, plan.models.policy.rules, chunked=True)
    return descend(problem, {role: plan.optimizers[role] for role in carry.params}, carry, chunks)


def policy_problem(plan: Plan, frozen: Frozen) -> Problem:
    """The algorithm's loss on the outputs of policy and critic."""
    models, algorithm, needs = plan.models, plan.algorithm, plan.algorithm.needs

    def forward(params, chunk):
        experience = chunk.experience
        extra = {name: experience.extra[name] for name in needs.extra}
        return _forward(models, params, frozen, experience.rollouts, extra, plan.temperature)

    def loss(output, chunk):
        experience, targets = chunk
        with jax.named_scope("loss"):
            terms, metrics = algorithm.loss(output, experience, targets, plan.group_size)
        gap = jnp.abs(output.logprobs - experience.logprobs)
        gap = mean_of(jax.lax.stop_gradient(gap), experience.rollouts.mask)
        return terms, union(metrics, {"update/first_logprob_gap": gap})

    return Problem(forward, loss, gradient_sharding(trained_models(models)))


def _forward(models, params, frozen, rollouts, extra, temperature) -> CompletionOutput:
    """One microbatch through policy and critic: the same function that evaluation chunks with."""
    with jax.named_scope("policy"):
        policy = evaluate_completions(
            models.policy,
            params["policy"],
            frozen["policy"],
            rollouts,
            temperature=temperature,
            rows=None,
        )
        rows = {
            name: evaluate_texts(models.policy, params["policy"], frozen["policy"], texts).logprobs
            for name, texts in extra.items()
        }
    scores = dict(policy.scores)
    if models.value is not None:
        scores |= value_scores(models, params, frozen, rollouts, temperature)
    return CompletionOutput(
        logprobs=policy.logprobs,
        entropy=policy.entropy,
        scores=scores,
        pooled=policy.pooled,
        extra=rows or None,
    )


def value_scores(models, params, frozen, rollouts, temperature) -> dict[str, Array]:
    """What a critic of its own says of one microbatch: {"value": [B T]}."""
    with jax.named_scope("value"):
        value = evaluate_completions(
            models.value,
            params["value"],
            frozen["value"],
            rollouts,
            temperature=temperature,
            rows=None,
        )
    return value.scores


# Splitting and permuting: groups stay whole, and prompts and extra rows count as groups of one.


def _group_of(path, group_size):
    """Rows per group of a leaf: K, or 1 for leaves with a row per prompt or per extra text."""
    name = jax.tree_util.keystr(path)
    single_rows = (".experience.rollouts.prompts", ".experience.extra")
    return 1 if name.startswith(single_rows) else group_size


def split_groups(batch: Batch, chunks: int, group_size: int) -> Batch:
    """Every leaf [R, ...] -> [chunks, R/chunks, ...], groups whole, strided by group."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: split_chunks(x, chunks, _group_of(path, group_size)), batch
    )


def permute_groups(batch: Batch, key: jax.Array, group_size: int) -> Batch:
    """One permutation of the groups for all leaves; extra rows of equal number stay together."""
    orders = {}

    def permute(path, x):
        group = _group_of(path, group_size)
        groups = x.shape[0] // group
        if groups not in orders:
            orders[groups] = jax.random.permutation(key, groups)
        grouped = jnp.reshape(x, (groups, group, *x.shape[1:]))
        return jnp.reshape(grouped[orders[groups]], x.shape)

    return jax.tree_util.tree_map_with_path(permute, batch)


def _keep_finite(new, old):
    """The algorithm's new state, or the old one if that was finite and the new one is not.

    One score that is not a number would otherwise stay in a running mean for ever.
    """

    def sound(n, o):
        if not jnp.issubdtype(o.dtype, jnp.inexact):
            return jnp.ones((), bool)
        return jnp.all(jnp.isfinite(n) | ~jnp.isfinite(o))

    # A weakly typed result would make the next update compile again.
    new = jax.tree.map(lambda n, o: jax.lax.convert_element_type(n, o.dtype), new, old)
    checks = jax.tree.leaves(jax.tree.map(sound, new, old))
    return choose(functools.reduce(jnp.logical_and, checks, jnp.ones((), bool)), new, old)


def check_batch(plan: Plan, experience: Experience) -> None:
    """Raises a ValueError for a batch that this plan cannot split."""
    rollouts, needs = experience.rollouts, plan.algorithm.needs
    if rollouts.group_size != plan.group_size:
        raise ValueError(f"groups of {rollouts.group_size}, but group_size={plan.group_size}")
    parts = plan.minibatches * plan.microbatches
    prompts = rollouts.prompts.tokens.shape[0]
    if prompts % parts:
        raise ValueError(
            f"{prompts} prompts do not split into minibatches={plan.minibatches} x "
            f"microbatches={plan.microbatches} of whole groups"
        )
    for name in needs.extra:
        if name not in experience.extra:
            raise ValueError(
                f"the algorithm needs extra rows {name!r}; the experience has "
                f"{sorted(experience.extra)}"
            )
    for name, texts in experience.extra.items():
        if texts.tokens.shape[0] % parts:
            raise ValueError(
                f"extra[{name!r}] has {texts.tokens.shape[0]} rows; wanted a multiple of {parts}"
            )
