"""One optimizer step on any problem, exact under any number of microbatches.

Every term of a loss is ``weight · total / count``. The counts are summed over all microbatches
before a gradient is taken, so the number of microbatches changes memory and nothing else; a mean
of microbatch means would weigh the tokens of a short microbatch more than those of a long one.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float

from rlhf_jax.mesh import constrain
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.metrics import single
from rlhf_jax.training.optimizer import KeptMoments
from rlhf_jax.types import Array, Metrics, Params, Term

Optimizers = Mapping[str, optax.GradientTransformation]


class Problem(NamedTuple):
    """What is minimised: ``loss(forward(params, chunk), chunk)``, and where its parts lie.

    forward(params, chunk) -> output
    loss(output, chunk) -> (terms, metrics)
    constrain_grads(grads) -> grads, sharded like the parameters
    """

    forward: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], tuple[dict[str, Term], Metrics]]
    constrain_grads: Callable[[Any], Any]


class Carry(NamedTuple):
    """What one minibatch hands to the next."""

    params: dict[str, Params]
    opt_state: dict[str, Any]
    skipped: jax.Array
    lr_scale: jax.Array  # never changed here


def descend(
    problem: Problem, optimizers: Optimizers, carry: Carry, chunks: Any
) -> tuple[Carry, Metrics]:
    """Gradients over all chunks (leaves [microbatches, rows, ...]), then one step per role."""
    with jax.named_scope("counts"):
        counts = count_terms(problem, carry.params, chunks)
    with jax.named_scope("gradients"):
        grads, loss, metrics = accumulate_gradients(problem, carry.params, chunks, counts)
    with jax.named_scope("apply"):
        return apply_gradients(optimizers, carry, grads, loss, metrics)


def count_terms(problem: Problem, params: Any, chunks: Any) -> dict[str, Float[Array, ""]]:
    """Every term's count, summed over the chunks, without running the model.

    Counts must not depend on parameters, so outputs of zeros give the same ones.
    """
    first = jax.tree.map(lambda x: x[0], chunks)
    shapes = jax.eval_shape(problem.forward, params, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def counts(chunk):
        terms, _ = problem.loss(zeros, chunk)
        return {name: jnp.asarray(term.mean.count, jnp.float32) for name, term in terms.items()}

    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(counts, chunks))


def accumulate_gradients(
    problem: Problem, params: Any, chunks: Any, counts: dict[str, Float[Array, ""]]
) -> tuple[Any, Float[Array, ""], Metrics]:
    """Gradient and value of  Σ_terms weight · Σ_chunks total / count,  and the metrics' sums.

    Gradients are added in float32 whatever the parameters' type.
    """

    def part(params, chunk):
        terms, metrics = problem.loss(problem.forward(params, chunk), chunk)
        value = weighted_sum(terms, counts)
        return value, union(metrics, term_means(terms))

    def step(total, chunk):
        (value, metrics), grads = jax.value_and_grad(part, has_aux=True)(params, chunk)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)
        return problem.constrain_grads(total), (value, metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, (values, metrics) = jax.lax.scan(step, problem.constrain_grads(zeros), chunks)
    metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
    loss = jnp.sum(values)
    return grads, loss, union(metrics, loss_report(loss, counts))


def weighted_sum(
    terms: Mapping[str, Term], counts: Mapping[str, Float[Array, ""]]
) -> Float[Array, ""]:
    """Σ weight · total / count over the terms of a loss; a term without a count adds nothing."""
    parts = [term.weight * _divide(term.mean.total, counts[n]) for n, term in terms.items()]
    return sum(parts, jnp.zeros((), jnp.float32))


def term_means(terms: Mapping[str, Term]) -> Metrics:
    """Every term, unweighted, as the metric ``loss/<term>``."""
    return {f"loss/{name}": term.mean for name, term in terms.items()}


def loss_report(loss: Float[Array, ""], counts: Mapping[str, Float[Array, ""]]) -> Metrics:
    """What a minibatch's loss was, and how many of its terms had nothing to average."""
    empty = sum((count == 0 for count in counts.values()), jnp.zeros((), jnp.float32))
    return {"update/loss": single(loss), "update/terms_empty": single(empty)}


def apply_gradients(
    optimizers: Optimizers, carry: Carry, grads: Any, loss: Float[Array, ""], metrics: Metrics
) -> tuple[Carry, Metrics]:
    """One optimizer step per role; nothing changes unless loss and gradients are finite.

    Updates are multiplied by ``lr_scale``: 0 leaves the parameters as they are, bit for bit, while
    the optimizers' statistics go on.
    """
    norms = {role: optax.tree.norm(grads[role]) for role in grads}
    finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, norms.values()))
    finite = finite & jnp.isfinite(loss)
    params, opt_state = {}, {}
    for role, optimizer in optimizers.items():
        old = carry.params[role]
        # Back to the parameters' type: optimizer statistics must keep theirs.
        own = jax.tree.map(lambda g, p: g.astype(p.dtype), grads[role], old)
        # Without extra arguments it drops `accept`, and its moments know nothing of it.
        informed = isinstance(optimizer, optax.GradientTransformationExtraArgs)
        pick = _choose_statistics if informed else choose
        optimizer = optax.with_extra_args_support(optimizer)
        updates, statistics = optimizer.update(own, carry.opt_state[role], old, accept=finite)
        new = scale_change(carry.lr_scale, optax.apply_updates(old, updates), old)
        params[role] = choose(finite, new, old)
        opt_state[role] = pick(finite, statistics, carry.opt_state[role])
    skipped = jnp.where(finite, 0, carry.skipped + 1)
    report = {"update/skipped": single(jnp.where(finite, 0.0, 1.0))}
    report |= {f"{role}/grad_norm": single(norm) for role, norm in norms.items()}
    return Carry(params, opt_state, skipped, carry.lr_scale), union(metrics, report)


def gradient_sharding(models: Mapping[str, Model]) -> Callable[[Any], Any]:
    """A function that lays gradients (by role) out like the parameters they belong to.

    Left to itself the compiler may keep whole gradients on every device.
    """

    def shard(grads):
        return {role: _shard_like(models[role], tree) for role, tree in grads.items()}

    return shard


def _shard_like(model, tree):
    axes, _ = partition(model.axes(), model.config)
    return jax.tree.map(lambda x, names: constrain(x, names, model.rules), tree, axes)


def _divide(total, count):
    """total / count, and 0 where there is nothing to average."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def choose(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The tree `new` where the condition holds, else `old`, bit for bit."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _choose_statistics(accepted, new, old):
    """`choose`, but for moments that knew of it when they were made."""

    def one(n, o):
        return n if isinstance(n, KeptMoments) else jnp.where(accepted, n, o)

    return jax.tree.map(one, new, old, is_leaf=lambda n: isinstance(n, KeptMoments))


def scale_change(scale: Float[Array, ""], new: Any, old: Any) -> Any:
    """old + scale · (new − old), leaf by leaf; at scale 1 it is `new`, bit for bit.

    A factor of 1.0 on the updates themselves would not be: compilers join the product of learning
    rate and direction with the sum into one operation, and a factor between them parts the two.
    """

    def one(n, o):
        return jnp.where(scale == 1, n, o + scale.astype(o.dtype) * (n - o))

    return jax.tree.map(one, new, old)


def union(a: Metrics, b: Metrics) -> Metrics:
    """Both dictionaries; a name in both is a ValueError, since one would hide the other."""
    twice = sorted(a.keys() & b.keys())
    if twice:
        raise ValueError(f"metrics named twice: {', '.join(twice)}")
    return a | b
