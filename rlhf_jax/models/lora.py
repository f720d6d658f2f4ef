"""Low-rank adapters by role: one frozen base, one small tree of adapters and heads per role.

A projection with adapters computes x W + (α/r) (x A) B (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). A and B lie beside W in the full tree as ``lora_a`` and
``lora_b``; here the tree is cut into what trains and what does not, put together again, and
folded into plain weights. Without adapters everything trains and the frozen part is empty.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import Params

ADAPTERS = ("lora_a", "lora_b")


def partition(params: Params, config: ModelConfig) -> tuple[Params, Params]:
    """(trainable, frozen): adapters and heads, and the base; all and {} without adapters.

    The frozen tree is a complete model without heads: applied with ``lora_rank=0`` it is the
    reference.
    """
    if config.lora_rank == 0:
        return params, {}
    return select(params, _is_trainable), select(params, lambda path: not _is_trainable(path))


def join(trainable: Params, frozen: Params) -> Params:
    """The full tree from its two parts (the inverse of `partition`).

    Raises:
        ValueError: both parts hold the same leaf.
    """
    return _merge(trainable, frozen, ())


def merge_lora(params: Params, config: ModelConfig) -> Params:
    """Plain params with the adapters folded in: W + (α/r) A B, computed in float32.

    The result belongs to the same configuration with ``lora_rank=0``. Sums are rounded
    differently from applied adapters: equal up to rounding, not bit for bit.
    """
    if config.lora_rank == 0:
        return params
    scale = config.lora_alpha / config.lora_rank
    layers = params["layers"]
    if isinstance(layers, list):
        folded = [_fold(layer, scale) for layer in layers]
    else:
        folded = jax.vmap(lambda layer: _fold(layer, scale))(layers)
    return {**params, "layers": folded}


def _is_trainable(path: tuple[str, ...]) -> bool:
    return path[-1] in ADAPTERS or path[0] == "heads"


def select(params: Params, keep: Callable[[tuple[str, ...]], bool]) -> dict[str, Any]:
    """The branches of a nested dict that lead to leaves to keep; empty dicts are dropped.

    Raises:
        ValueError: layers are a list, one tree each.
    """
    return _select(params, (), keep)


def _select(node: Any, path: tuple[str, ...], keep: Callable[[tuple[str, ...]], bool]) -> Any:
    out = {}
    for name, child in node.items():
        below = (*path, name)
        if isinstance(child, list):
            raise ValueError("partition takes stacked params, before model.unstack(params)")
        if isinstance(child, dict):
            child = _select(child, below, keep)
            if child:
                out[name] = child
        elif keep(below):
            out[name] = child
    return out


def _merge(left: Any, right: Any, path: tuple[str, ...]) -> Any:
    out = dict(left)
    for name, child in right.items():
        if name not in out:
            out[name] = child
        elif isinstance(child, dict) and isinstance(out[name], dict):
            out[name] = _merge(out[name], child, (*path, name))
        else:
            raise ValueError(f"both trees hold {'/'.join((*path, name))}")
    return out


def _fold(node: Any, scale: float) -> Any:
    """One layer's tree without adapters."""
    if not isinstance(node, dict):
        return node
    plain = {name: _fold(child, scale) for name, child in node.items() if name not in ADAPTERS}
    if "lora_a" in node:
        low, up, kernel = (node[n].astype(jnp.float32) for n in (*ADAPTERS, "kernel"))
        exact = jax.lax.Precision.HIGHEST
        change = jnp.tensordot(low, up, axes=1, precision=exact)
        plain["kernel"] = (kernel + scale * change).astype(node["kernel"].dtype)
    return plain
