"""The train state: trainable leaves by role, born with the shardings that updates return.

Roles are "policy" and, where the critic is a network of its own, "value". Only what trains is
here. What does not (the base under adapters, the reference) travels beside the state in
``frozen``, a dict by role that no step donates.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.models.transformer import Model
from rlhf_jax.types import Algorithm, Needs, Params, TrainState


class Models(NamedTuple):
    """The networks by role. ``value=None``: no critic, or a value head on the policy's trunk."""

    policy: Model
    value: Model | None = None
    reference: Model | None = None


def trained_models(models: Models) -> dict[str, Model]:
    """The models that have trainable parameters, by role."""
    roles = {"policy": models.policy, "value": models.value}
    return {role: model for role, model in roles.items() if model is not None}


def check_roles(models: Models, roles: Iterable[str], needs: Needs) -> None:
    """Raises a ValueError if the models cannot serve the algorithm or the roles do not fit."""
    wanted, got = sorted(trained_models(models)), sorted(roles)
    if wanted != got:
        raise ValueError(f"models train the roles {wanted}, but parameters or optimizers: {got}")
    if needs.reference and models.reference is None:
        raise ValueError("the algorithm needs a reference; models.reference is None")
    critic = models.value or models.policy
    if needs.value and "value" not in critic.config.score_heads:
        raise ValueError(
            f"the algorithm needs values, but the critic has the heads "
            f"{critic.config.score_heads}; add 'value' to its score_heads"
        )


def create_state(
    models: Models,
    params: Mapping[str, Params],
    optimizers: Mapping[str, optax.GradientTransformation],
    algorithm: Algorithm,
    mesh: Mesh,
) -> TrainState:
    """A state at step 0 in buffers of its own.

    Parameters are copied: the state is donated to every update, and a reference or reward model
    that shared its buffers would be deleted with it. Drop the originals where memory is short.

    Args:
        params: the *trainable* leaves by role, sharded as they shall stay.
        optimizers: one per role.

    Raises:
        ValueError: the roles of models, params and optimizers differ, or the algorithm needs
            what the models lack.
    """
    check_roles(models, params, algorithm.needs)
    check_roles(models, optimizers, algorithm.needs)
    return create_train_state(params, optimizers, algorithm.init, mesh)


def create_train_state(
    params: Mapping[str, Params],
    optimizers: Mapping[str, optax.GradientTransformation],
    init_algorithm: Any,
    mesh: Mesh,
) -> TrainState:
    """`create_state` without models to check against: supervised training uses this."""
    build = _builder(optimizers, init_algorithm)
    shardings = state_shardings(params, optimizers, init_algorithm, mesh)
    return jax.jit(build, out_shardings=shardings)(dict(params))


def state_shardings(
    params: Mapping[str, Params],
    optimizers: Mapping[str, optax.GradientTransformation],
    init_algorithm: Any,
    mesh: Mesh,
) -> TrainState:
    """The sharding of every leaf of the state, as a `TrainState` of shardings.

    Parameters keep theirs (replicated where they have none on this mesh), optimizer statistics
    lie like the parameter they belong to, everything else is replicated.

    Args:
        params: arrays or ShapeDtypeStructs that carry shardings.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(_builder(optimizers, init_algorithm), dict(params))
    by_param = {
        role: jax.tree.map(lambda x: _sharding_on(x, mesh, replicated), tree)
        for role, tree in params.items()
    }
    by_statistic = {
        role: optax.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            shapes.opt_state[role],
            by_param[role],
            transform_non_params=lambda _: replicated,
        )
        for role, optimizer in optimizers.items()
    }
    algorithm = jax.tree.map(lambda _: replicated, shapes.algorithm)
    # Shardings are no arrays, so the constructor would refuse them: fields in their order.
    fields = (replicated, by_param, by_statistic, algorithm, replicated, replicated)
    leaves = jax.tree.leaves(fields)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def abstract_state(
    params: Mapping[str, Params],
    optimizers: Mapping[str, optax.GradientTransformation],
    init_algorithm: Any,
    mesh: Mesh,
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: a restore target, an input to `lower`."""
    shapes = jax.eval_shape(_builder(optimizers, init_algorithm), dict(params))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        state_shardings(params, optimizers, init_algorithm, mesh),
    )


def _builder(optimizers, init_algorithm):
    """params -> TrainState, to be traced."""

    def build(params):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=jax.tree.map(jnp.copy, params),
            opt_state={role: optimizers[role].init(params[role]) for role in params},
            algorithm=jax.tree.map(_strong, init_algorithm()),
            skipped=jnp.zeros((), jnp.int32),
            lr_scale=jnp.ones((), jnp.float32),
        )

    return build


def _strong(x):
    """A Python number would give a weakly typed leaf, and the second update would recompile."""
    return jax.lax.convert_element_type(x, jnp.result_type(x))


def _sharding_on(x, mesh, replicated):
    sharding = x.sharding
    on_mesh = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
    return sharding if on_mesh else replicated
