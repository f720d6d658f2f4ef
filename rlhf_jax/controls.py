"""Controllers of a policy run, from its config: the KL coefficient, and the reference.

What they hold stands in `RunState`: β in ``controllers["kl_coef"]``, as an array on the devices
that the compiled steps take as an argument, the reference where it always is. So nothing compiles
again when they move, and a run that is stopped and started again goes on as it would have.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlhf_jax import build, roles
from rlhf_jax.mesh import replicate
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.ops.controllers import adapted_kl_coef, moved
from rlhf_jax.ops.metrics import single
from rlhf_jax.types import Algorithm, KlCoef, Mean, Metrics, Params

KL_COEF = "kl_coef"


class KlControl(NamedTuple):
    """β follows the KL to the reference; see `ops.controllers.adapted_kl_coef`."""

    coef: KlCoef
    target: float  # nats per completion
    horizon: int  # completions
    rollouts: int  # completions of a step


class ReferenceControl(NamedTuple):
    """The reference follows the policy: every so many of its steps, by so much."""

    every: int
    decay: float  # what stays of it; 0: the policy takes its place


class Controls(NamedTuple):
    """The controllers of a run; None where one is off."""

    kl_coef: KlControl | None = None
    reference: ReferenceControl | None = None


def make_controls(
    config: ConfigDict, algorithm: Algorithm, policy: ModelConfig, rollouts: int
) -> Controls:
    """What ``config.controllers`` says.

    Args:
        policy: the policy's model.
        rollouts: completions of a step.

    Raises:
        ValueError: for controllers of what this run does not have, and values that cannot work.
    """
    section, name = config.get("controllers", {}), config.algorithm.name
    kl_coef = reference = None
    if "kl_coef" in section:
        kl_coef = _kl_control(section.kl_coef, name, algorithm, rollouts)
    if "reference" in section:
        reference = _reference_control(section.reference, name, algorithm, policy)
        steps = build.policy_steps(config)
        if reference.every > steps:
            raise ValueError(
                f"controllers.reference.every={reference.every}, but the policy has {steps} steps, "
                "so the reference would never move; make it smaller"
            )
    return Controls(kl_coef, reference)


def _kl_control(section, name, algorithm, rollouts) -> KlControl:
    path = "controllers.kl_coef"
    if algorithm.kl_coef is None:
        raise ValueError(
            f"{path} changes the kl_coef of an algorithm, and {name} as configured has none; set "
            "algorithm.kl_coef above 0 where it takes one, or leave the controller out"
        )
    if not section.target > 0:
        raise ValueError(f"{path}.target={section.target}; wanted nats per completion above 0")
    if section.horizon < rollouts:
        raise ValueError(
            f"{path}.horizon={section.horizon} is less than the {rollouts} completions of a step; "
            "wanted as many or more, such as 100 times as many"
        )
    return KlControl(algorithm.kl_coef, section.target, section.horizon, rollouts)


def _reference_control(section, name, algorithm, policy) -> ReferenceControl:
    path, decay = "controllers.reference", section.get("decay", 0.0)
    if not algorithm.needs.reference:
        raise ValueError(
            f"{path} moves the reference, and {name} as configured has none; give it a KL term, "
            "or leave the controller out"
        )
    if policy.lora_rank:
        raise ValueError(
            f"{path} moves the reference, which with model.lora_rank={policy.lora_rank} is the "
            "frozen base under the adapters; set model.lora_rank=0, or leave the controller out"
        )
    if not 0 <= decay < 1:
        raise ValueError(f"{path}.decay={decay}; wanted 0 (a reset) or more, and less than 1")
    if decay and policy.param_dtype != "float32":
        raise ValueError(
            f"{path}.decay={decay} adds small steps, which model.param_dtype="
            f"{policy.param_dtype!r} rounds away; set it to 'float32', or decay=0.0 to reset"
        )
    return ReferenceControl(section.every, decay)


def initial(controls: Controls, mesh: Mesh) -> dict[str, Any]:
    """``RunState.controllers`` at step 0."""
    if controls.kl_coef is None:
        return {}
    return {KL_COEF: replicate(np.float32(controls.kl_coef.coef.start), mesh)}


def compile_kl_coef(control: KlControl | None, mesh: Mesh) -> Callable | None:
    """A compiled (β, KL) -> (β after the step, metrics: β of the step)."""
    if control is None:
        return None

    def adapt_kl_coef(kl_coef: jax.Array, kl: Mean) -> tuple[jax.Array, Metrics]:
        new = adapted_kl_coef(
            kl_coef,
            kl.total / kl.count,
            target=control.target,
            horizon=control.horizon,
            rollouts=control.rollouts,
            most=control.coef.most,
        )
        return new, {"controller/kl_coef": single(kl_coef)}

    # Laid out as at step 0: else the update would compile again.
    return jax.jit(adapt_kl_coef, out_shardings=NamedSharding(mesh, PartitionSpec()))


def compile_reference(control: ReferenceControl | None, reference: Params) -> Callable | None:
    """A compiled (reference, policy) -> reference, in buffers that no other tree has.

    With a decay the old reference is donated: it is gone with the call.
    """
    if control is None:
        return None
    shardings = jax.tree.map(lambda x: x.sharding, reference)

    def move_reference(reference: Params, policy: Params) -> Params:
        known = roles.only(policy, reference)  # not a head on the policy's trunk
        return jax.tree.map(lambda r, p: moved(r, p, control.decay), reference, known)

    donated = 0 if control.decay else ()  # a reset reads nothing of the old one
    return jax.jit(move_reference, donate_argnums=donated, out_shardings=shardings)
