"""The step of a reward model that learns beside the policy: the one that everything else takes.

A reward says what its loss is, and gets from here what it may not know: the optimizer, how its
statistics lie on the mesh, and `training.gradients.descend`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.metrics import single
from rlhf_jax.training.experience import constrain_rows
from rlhf_jax.training.gradients import Carry, Problem, descend, gradient_sharding, union
from rlhf_jax.training.state import state_shardings
from rlhf_jax.types import Learner


class Learning(NamedTuple):
    """A learner's state: its optimizer's, and how many steps in a row were not finite."""

    optimizer: Any
    skipped: jax.Array


_ROLE = "reward"
_OWN = ("loss/", "update/")  # what `descend` says of single terms


def make_learner(optimizer: optax.GradientTransformation, model: Model, mesh: Mesh) -> Learner:
    """Steps of `optimizer` on what trains of `model`.

    A step whose loss or gradient is not finite changes nothing but a count. Metrics: ``loss`` (the
    weighted sum of terms), ``grad_norm``, ``skipped`` (1 for such a step), ``skipped_in_row`` and
    those of the loss itself.
    """
    shard = gradient_sharding({_ROLE: model})

    def init(params):
        own, optimizers = {_ROLE: params}, {_ROLE: optimizer}
        born = state_shardings(own, optimizers, lambda: (), mesh).opt_state[_ROLE]
        return Learning(jax.jit(optimizer.init, out_shardings=born)(params), jnp.int32(0))

    def step(params, state, forward, loss, chunks):
        problem = Problem(lambda own, chunk: forward(own[_ROLE], chunk), loss, shard)
        carry = Carry({_ROLE: params}, {_ROLE: state.optimizer}, state.skipped, jnp.float32(1))
        chunks = constrain_rows(chunks, model.rules, chunked=True)
        after, found = descend(problem, {_ROLE: optimizer}, carry, chunks)
        renamed = {
            "loss": found.pop("update/loss"),
            "grad_norm": found.pop(f"{_ROLE}/grad_norm"),
            "skipped": found.pop("update/skipped"),
            "skipped_in_row": single(after.skipped.astype(jnp.float32)),
        }
        said = {name: mean for name, mean in found.items() if not name.startswith(_OWN)}
        state = Learning(after.opt_state[_ROLE], after.skipped)
        return shard(after.params)[_ROLE], state, union(renamed, said)

    return Learner(init=init, step=step)
