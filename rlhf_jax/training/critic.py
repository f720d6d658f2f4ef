"""The critic alone: an update that leaves the policy and its optimizer as they are, bit for bit.

It is for the first steps of a run, while the policy is still the one that it started from. A critic
that starts as a reward model has never judged an unfinished completion; the advantages of early
tokens would be wrong before anything is learnt (Yuan et al. 2025, VC-PPO,
https://arxiv.org/abs/2503.01491).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.ops.metrics import single
from rlhf_jax.training.gradients import Carry, Optimizers, Problem, gradient_sharding
from rlhf_jax.training.state import Models
from rlhf_jax.training.update import (
    Batch,
    Plan,
    UpdateStep,
    check_batch,
    explained_variance,
    plan_update,
    run_epochs,
    value_scores,
)
from rlhf_jax.types import Algorithm, Array, CompletionOutput, Metrics, Term

_ROLE = "value"


def make_critic_step(
    models: Models,
    algorithm: Algorithm,
    optimizers: Optimizers,
    *,
    temperature: Float[Array, ""] | float,
    **sizes: int,
) -> UpdateStep:
    """A pure function (state, frozen, experience, key) -> (state, metrics), as `make_update_step`.

    It descends the term "value" of the algorithm's loss and no other: only the critic's parameters
    and its optimizer change, and ``skipped``. The policy's, the algorithm's state and ``step``,
    which counts updates of the policy, come back as they went in. Only the critic runs.

    Metrics: ``value/...`` of the algorithm's own, ``value/explained_variance`` before the update,
    ``value/pretraining`` (1: that this was such a step), ``loss/value``, ``value/grad_norm`` and
    ``update/...`` but for the gap of log-probs.

    Args:
        models: with a critic of its own.
        algorithm: its targets' returns are what the critic learns.
        optimizers: one per role, as for the update.
        sizes: epochs, minibatches, microbatches and group_size, as for the update.

    Raises:
        ValueError: as `make_update_step`; or the critic has no parameters of its own, or the
            loss no term "value".
    """
    if models.value is None:
        raise ValueError(
            "the critic is a head on the policy's trunk, which would not stay as it is; give it "
            "a tree of its own"
        )
    plan = plan_update(models, algorithm, optimizers, temperature=temperature, **sizes)

    def critic_step(state, frozen, experience, key):
        check_batch(plan, experience)
        with jax.named_scope("targets"):
            targets, _ = algorithm.targets(experience, plan.group_size, state.algorithm)
        batch = jax.lax.stop_gradient(Batch(experience, targets))
        own = [{_ROLE: tree[_ROLE]} for tree in (state.params, state.opt_state)]
        carry = Carry(*own, state.skipped, state.lr_scale)
        carry, metrics = run_epochs(plan, _critic_problem(plan, frozen), carry, batch, key)
        metrics = jax.tree.map(lambda x: jnp.sum(x, axis=(0, 1)), metrics)
        state = dataclasses.replace(
            state,
            params={**state.params, **carry.params},
            opt_state={**state.opt_state, **carry.opt_state},
            skipped=carry.skipped,
        )
        return state, metrics | {
            "value/explained_variance": explained_variance(experience, targets),
            "value/pretraining": single(jnp.ones((), jnp.float32)),
            "update/skipped_in_row": single(carry.skipped.astype(jnp.float32)),
        }

    return critic_step


def _critic_problem(plan: Plan, frozen: Any) -> Problem:
    """The term "value" on the outputs of the critic; those of the policy are what they were."""
    models = plan.models

    def forward(params, chunk):
        rollouts = chunk.experience.rollouts
        return value_scores(models, params, frozen, rollouts, plan.temperature)

    def loss(scores, chunk):
        experience, targets = chunk
        rows = {name: experience.extra[name].tokens for name in plan.algorithm.needs.extra}
        output = CompletionOutput(
            logprobs=experience.logprobs,
            entropy=jnp.zeros_like(experience.logprobs),
            scores=scores,
            extra={name: jnp.zeros(x.shape, jnp.float32) for name, x in rows.items()},
        )
        with jax.named_scope("loss"):
            terms, metrics = plan.algorithm.loss(output, experience, targets, plan.group_size)
        return _of_value(terms, metrics)

    return Problem(forward, loss, gradient_sharding({_ROLE: models.value}))


def _of_value(terms: dict[str, Term], metrics: Metrics) -> tuple[dict[str, Term], Metrics]:
    """The term "value" and what is measured of values."""
    if _ROLE not in terms:
        raise ValueError(
            f"the loss has no term {_ROLE!r} for a critic alone, only {', '.join(sorted(terms))}"
        )
    own = {name: mean for name, mean in metrics.items() if name.startswith(f"{_ROLE}/")}
    return {_ROLE: terms[_ROLE]}, own
