"""What is known about rollouts before the update: old log-probs, reference log-probs, values."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float

from rlhf_jax.mesh import constrain
from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.training.state import Models
from rlhf_jax.types import (
    Array,
    CompletionOutput,
    Experience,
    Needs,
    Params,
    Rollouts,
    Scores,
    Texts,
)

# Without this, some backends keep bfloat16 intermediates in float32 in one program and round
# them in another; old log-probs would differ from the update's by up to 0.1 nats.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}

# XLA on CPUs hands products and sums to a library that joins them into larger kernels, in one
# program otherwise than in another: a sum after a product then adds up in another order. Sums are
# slower so, but given to the library ("..._REDUCE") they take the products in again.
APART = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

Evaluated = tuple[CompletionOutput | None, CompletionOutput | None, CompletionOutput | None]


def make_evaluate_step(
    models: Models,
    needs: Needs,
    *,
    temperature: Float[Array, ""] | float,
    rows: int | None,
    trained: bool = True,
) -> Callable[[Mapping[str, Params], Mapping[str, Params], Rollouts], Evaluated]:
    """A pure function (params, frozen, rollouts) -> (policy, reference, value) outputs.

    ``params`` are the state's trainable leaves by role. An output that nobody needs is None and
    its pass is not computed. A value head on the policy's trunk costs no second pass.

    Args:
        models: the networks by role.
        needs: what the algorithm asks for.
        temperature: the sampling temperature; log-probs are those of logits / temperature.
        rows: rollouts per forward pass. Take the update's microbatch: in equal chunks the
            update's first probability ratio is exactly 1, in others it is off in the last bits.
        trained: whether policy and critic run; False where the update does it
            (`training.one_pass`).
    """

    def evaluate_step(params, frozen, rollouts):
        def run(model, tree, base):
            output = evaluate_completions(
                model, tree, base, rollouts, temperature=temperature, rows=rows
            )
            return constrain_rows(output, model.rules)

        policy = reference = value = None
        if trained:
            with jax.named_scope("evaluate_policy"):
                policy = run(models.policy, params["policy"], frozen["policy"])
        if needs.reference:
            with jax.named_scope("evaluate_reference"):
                reference = run(models.reference, _reference(frozen), {})
        if needs.value and trained:
            with jax.named_scope("evaluate_value"):
                own = models.value is not None
                value = run(models.value, params["value"], frozen["value"]) if own else policy
        return policy, reference, value

    return evaluate_step


def make_experience(
    rollouts: Rollouts,
    scores: Scores,
    policy_out: CompletionOutput | None,
    ref_out: CompletionOutput | None,
    value_out: CompletionOutput | None,
    extra: dict[str, Texts],
    kl_coef: Float[Array, ""] | None = None,
) -> Experience:
    """Joins rollouts, scores and the models' outputs; passes that were skipped become zeros.

    Args:
        kl_coef: β in this step where a controller drives it.
    """
    zeros = _zeros_like(rollouts.logprobs if policy_out is None else policy_out.logprobs)
    return Experience(
        rollouts=rollouts,
        scores=scores,
        logprobs=zeros if policy_out is None else policy_out.logprobs,
        ref_logprobs=zeros if ref_out is None else ref_out.logprobs,
        values=zeros if value_out is None else value_out.scores["value"],
        extra=extra,
        kl_coef=kl_coef,
    )


@dataclasses.dataclass(frozen=True)
class ScoreStep:
    """A compiled reward: (state, rollouts) -> (Scores, state).

    Leaves of the state that come back as they went in, such as the parameters of a reward
    model, stay the arrays they are: ``compiled`` returns None for them, not a copy.
    """

    compiled: Callable

    def __call__(self, state: Any, rollouts: Rollouts) -> tuple[Scores, Any]:
        scores, new = self.compiled(state, rollouts)
        kept = jax.tree.map(
            lambda n, old: old if n is None else n, new, state, is_leaf=lambda n: n is None
        )
        return scores, kept


def compile_score(score: Callable[[Any, Rollouts], tuple[Scores, Any]]) -> ScoreStep:
    """Compiles the ``score`` of a reward on the device. Nothing is donated."""

    def score_step(state, rollouts):
        scores, new = score(state, rollouts)
        return scores, jax.tree.map(lambda n, old: None if n is old else n, new, state)

    return ScoreStep(jax.jit(score_step, compiler_options=COMPILER_OPTIONS))


def compile_evaluate(evaluate_step: Callable, mesh: Mesh) -> Callable:
    """Compiles an evaluate step; call it under ``jax.set_mesh(mesh)``. Nothing is donated."""
    return jax.jit(on_mesh(evaluate_step, mesh), compiler_options=exact_options(mesh))


def exact_options(mesh: Mesh) -> dict[str, bool | str]:
    """Compiler options under which evaluate and update steps round alike.

    With them the first ratio of an update is exactly 1 at any size that was tried
    (docs/results/workloads.md has what they cost).
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return COMPILER_OPTIONS | (APART if on_cpu and _compiles_with_apart() else {})


@functools.cache
def _compiles_with_apart() -> bool:
    """Whether this jaxlib knows the option: it is an experimental one."""
    try:
        jax.jit(lambda: 0, compiler_options=APART).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def constrain_rows(tree: Any, rules: Any, *, chunked: bool = False) -> Any:
    """Keeps the rows of every leaf spread over the mesh's batch axes.

    Args:
        tree: leaves [R, ...], or [chunks, R, ...] where ``chunked``.
    """
    lead = (None, "batch") if chunked else ("batch",)

    def shard(x):
        return constrain(x, lead + (None,) * (x.ndim - len(lead)), rules)

    return jax.tree.map(shard, tree)


def on_mesh(step: Callable, mesh: Mesh) -> Callable:
    """``step``, which refuses to be traced outside ``jax.set_mesh(mesh)``.

    There every sharding constraint would do nothing, in silence.
    """

    @functools.wraps(step)
    def checked(*args):
        if jax.sharding.get_abstract_mesh() != mesh.abstract_mesh:
            raise ValueError(f"call this step under jax.set_mesh(mesh) with the mesh {mesh}")
        return step(*args)

    return checked


def _reference(frozen):
    """The reference's parameters: those of its own, else the base under the policy's adapters."""
    return frozen["reference"] if frozen.get("reference") else frozen["policy"]


# Compiled even when called outside a step, so that the zeros span the devices of x.
_zeros_like = jax.jit(jnp.zeros_like)
