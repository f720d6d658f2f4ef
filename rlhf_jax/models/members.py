"""E reward models as one: which leaves of the tree every member has of its own.

    family         parameters           members share
    independent    E (M + L)            nothing
    linear         M + E L              the trunk, which then runs once for all
    lora           M + E L + E A        the frozen trunk; each has adapters and heads

(M a trunk, L its heads, A adapters; Zhang et al. 2024, https://arxiv.org/abs/2401.16635, table 1.)
Leaves of a member's own lie stacked in one tree, the member axis E before all others, so that one
program trains or asks all members: a `jax.vmap` over what is their own and over nothing else. What
depends on shared leaves alone is computed once, which for "linear" is all but the heads. Members
without a common trunk score the same rows one after the other, in a loop of the same program.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import ADAPTERS, join, select
from rlhf_jax.types import Array, Params


def split_members(params: Params, config: ModelConfig) -> tuple[Params, Params]:
    """(what each member has of its own, stacked [E ...]; what they share)."""
    own = select(params, lambda path: is_own(config, path))
    return own, select(params, lambda path: not is_own(config, path))


def is_own(config: ModelConfig, path: tuple[str, ...]) -> bool:
    """Whether the leaf of this path is a member's own: always False for one model."""
    if config.members == 1:
        return False
    if config.ensemble == "independent" or path[0] == "heads":
        return True
    return config.ensemble == "lora" and path[-1] in ADAPTERS


def stacked_init(init: Callable[[Array], Params], config: ModelConfig) -> Callable[[Array], Params]:
    """``init`` of one model as that of all members; member 0 starts as the model of that key."""
    if config.members == 1:
        return init

    def init_members(key: Array) -> Params:
        keys = [key, *(jax.random.fold_in(key, number) for number in range(1, config.members))]
        own, _ = split_members(jax.vmap(init)(jnp.stack(keys)), config)
        return join(own, split_members(init(key), config)[1])

    return init_members


def stacked_axes(axes: Mapping[str, Any], config: ModelConfig) -> Any:
    """The tree of logical axes of one model as that of all members."""
    own, shared = split_members(axes, config)
    leading = jax.tree.map(
        lambda names: ("members", *names), own, is_leaf=lambda node: isinstance(node, tuple)
    )
    return join(leading, shared)


def repeated(params: Params, config: ModelConfig) -> Params:
    """The tree of all members from that of one model, or a part of it: its trunk for every member.

    Heads are left out: members that began with one head would stay one member.
    """
    kept = {name: leaf for name, leaf in params.items() if name != "heads"}
    own, shared = split_members(kept, config)
    return join(jax.tree.map(lambda x: jnp.stack([x] * config.members), own), shared)


def member_of(params: Params, config: ModelConfig, number: int) -> Params:
    """One member's tree; it belongs to the same configuration with ``members=1``."""
    own, shared = split_members(params, config)
    return join(jax.tree.map(lambda x: x[number], own), shared)


def each_member(
    run: Callable[..., Any], params: Params, config: ModelConfig, *by_member: Any
) -> Any:
    """``run(one member's tree, one of by_member, ...)`` for all members, leaves [E ...].

    Args:
        by_member: trees with a leading member axis; what `run` closes over all members read.
    """
    own, shared = split_members(params, config)

    def run_one(mine, *given):
        return run(join(mine, shared), *given)

    # Members whose trunks differ read common rows in turn: one member's activations at a time,
    # and with adapters products are those of one model (5 members: 5.3 times one, not 6.3).
    if config.ensemble != "linear" and not by_member:
        return jax.lax.map(run_one, own)
    return jax.vmap(run_one)(own, *by_member)


def num_parameters(shapes: Params) -> int:
    """How many numbers a tree of parameters, or of their shapes, holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def average(models: list[Params]) -> Params:
    """The mean of every leaf over several models of one shape, in float32, in the leaf's type.

    Weight-averaged reward models (WARM: Ramé et al. 2024, https://arxiv.org/abs/2401.12187): runs
    from one pretrained trunk that differ in data order or settings lie in one basin, and their mean
    is one model at the price of one that errs less where labels are noisy.

    Raises:
        ValueError: no model, or models of different shapes.
    """
    if not models:
        raise ValueError("average: no models were given")
    forms = {str(jax.tree.map(lambda x: x.shape, params)) for params in models}
    if len(forms) > 1:
        raise ValueError("average: the models differ in shape; wanted runs of one trunk and heads")

    def mean(*leaves):
        total = sum(leaf.astype(jnp.float32) for leaf in leaves)
        return (total / len(leaves)).astype(leaves[0].dtype)

    return jax.tree.map(mean, *models)


def average_members(params: Params, config: ModelConfig) -> Params:
    """The members' mean as one model: what is their own averaged, what they share as it is."""
    own, shared = split_members(params, config)
    return join(average([jax.tree.map(lambda x, i=i: x[i], own) for i in range(config.members)]),
                shared)  # fmt: skip
