"""Evaluation and update in one: for batches that are trained on once, whole.

    forward                        policy and critic, once
    targets                        from old log-probs and values, which are this pass's own
    gradients, apply               of the same pass

With one epoch of one minibatch of one microbatch the update's forward pass is the one that
evaluation would have made before: the same parameters on the same rows. So policy and critic run
once less, and nothing more is kept than the update keeps anyway. The ratio is 1 by construction.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from rlhf_jax.training.experience import constrain_rows
from rlhf_jax.training.gradients import (
    Optimizers,
    apply_gradients,
    loss_report,
    term_means,
    union,
    weighted_sum,
)
from rlhf_jax.training.state import Models
from rlhf_jax.training.update import (
    Batch,
    Frozen,
    Plan,
    UpdateStep,
    after_update,
    batch_report,
    carry_of,
    check_batch,
    plan_update,
    policy_problem,
)
from rlhf_jax.types import (
    Algorithm,
    Array,
    CompletionOutput,
    Experience,
    Metrics,
    TrainState,
)

# (experience, entropy [B T], policy steps before this one) -> metrics of the batch.
Report = Callable[[Experience, Float[Array, "B T"], Int[Array, ""]], Metrics]


def fits_one_pass(*, epochs: int, minibatches: int, microbatches: int) -> bool:
    """Whether these numbers of an update are those of one pass over the whole batch."""
    return epochs == minibatches == microbatches == 1


def make_one_pass_step(
    models: Models,
    algorithm: Algorithm,
    optimizers: Optimizers,
    *,
    temperature: Float[Array, ""] | float,
    group_size: int,
    report: Report,
) -> UpdateStep:
    """A pure function (state, frozen, experience, key) -> (state, metrics), as `make_update_step`.

    Of the experience it takes rollouts, scores, reference log-probs and extra rows; log-probs and
    values it finds itself, and only then asks the algorithm for its targets. The parameters that
    come back are those of `make_update_step` on evaluated experience, up to rounding.

    Metrics: those of `make_update_step`, and those of ``report``, which sees the experience with
    all that was found.

    Args:
        group_size: K, rows per prompt.

    Raises:
        ValueError: as `make_update_step`.
    """
    one = dict(epochs=1, minibatches=1, microbatches=1)
    plan = plan_update(
        models, algorithm, optimizers, temperature=temperature, group_size=group_size, **one
    )

    def one_pass_step(state, frozen, experience, key):
        del key  # nothing is permuted
        return _one_pass(plan, report, state, frozen, experience)

    return one_pass_step


def _one_pass(
    plan: Plan, report: Report, state: TrainState, frozen: Frozen, experience: Experience
) -> tuple[TrainState, Metrics]:
    check_batch(plan, experience)
    problem = policy_problem(plan, frozen)

    def part(params):
        output = problem.forward(params, Batch(experience, None))
        known = _with_output(plan, experience, jax.lax.stop_gradient(output))
        with jax.named_scope("targets"):
            targets, algorithm_state = plan.algorithm.targets(
                known, plan.group_size, state.algorithm
            )
        batch, algorithm_state = jax.lax.stop_gradient((Batch(known, targets), algorithm_state))
        terms, metrics = problem.loss(output, batch)
        counts = {name: _count(term.mean.count) for name, term in terms.items()}
        value = weighted_sum(terms, counts)
        metrics = union(union(metrics, term_means(terms)), loss_report(value, counts))
        entropy = jax.lax.stop_gradient(output.entropy)
        metrics = union(metrics, report(known, entropy, state.step))
        return value, (batch, algorithm_state, metrics)

    carry = carry_of(state)
    with jax.named_scope("gradients"):
        (loss, (batch, algorithm_state, metrics)), grads = jax.value_and_grad(part, has_aux=True)(
            carry.params
        )
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        grads = problem.constrain_grads(grads)
    with jax.named_scope("apply"):
        optimizers = {role: plan.optimizers[role] for role in carry.params}
        carry, metrics = apply_gradients(optimizers, carry, grads, loss, metrics)
    metrics |= batch_report(plan, carry, batch)
    return after_update(state, carry, algorithm_state), metrics


def _with_output(plan: Plan, experience: Experience, output: CompletionOutput) -> Experience:
    """The experience with what policy and critic say of it before the update."""
    needs = plan.algorithm.needs
    found = (output.logprobs, output.scores["value"] if needs.value else experience.values)
    logprobs, values = constrain_rows(found, plan.models.policy.rules)
    return dataclasses.replace(experience, logprobs=logprobs, values=values)


def _count(count: Array) -> Float[Array, ""]:
    return jax.lax.stop_gradient(jnp.asarray(count, jnp.float32))
