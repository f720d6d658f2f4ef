"""Products of few rows on CPUs: matrices with their outputs first.

A product x W of 32 rows takes as long as W takes to come from memory. XLA's library on CPUs packs
the right-hand side before it multiplies, which W, of the two, should not be; as the left-hand side
of yᵀ = Wᵀ xᵀ, with outputs first, it is read once as it lies. On other backends the compiler
chooses the layout. docs/results/workloads.md has what it saves.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import Array, Params

TURNED = "turned"  # beside "kernel" in a projection's leaves, and then read in its place
INPUT_AXES = {"output": 2}  # how many of a kernel's axes are inputs; 1 where nothing stands
LEAST_ROWS, MOST_ROWS = 4, 128
LEAST_TOKENS = 8  # of a loop: to turn a matrix takes half to all the time of a product with it


def turns(config: ModelConfig, mesh: Mesh | None, rows: int, tokens: int) -> bool:
    """Whether a decode loop of so many tokens over `rows` rows wants its matrices turned.

    Only float32 on CPUs, where it was measured, and only whole matrices: turned ones carry no
    sharding rule.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    on_one_cpu = platform == "cpu" and (mesh is None or mesh.size == 1)
    worth = LEAST_ROWS <= rows <= MOST_ROWS and tokens >= LEAST_TOKENS
    return on_one_cpu and worth and config.compute_dtype == "float32"


def turn(weights: Params, head: Params, config: ModelConfig) -> tuple[Params, Params]:
    """Both trees of `sampler.decoding_params` with turned matrices; made once, before a loop.

    They are a copy of the weights, which lives as long as the loop.
    """
    layers = [_turn_module("", layer) for layer in weights["layers"]]
    tied = config.tie_embeddings
    table = head["embed"]["table"] if tied else head["unembed"]["kernel"].T
    return {**weights, "layers": layers}, {**head, "unembed": {TURNED: table}}


def _turn_module(name, leaves):
    if not isinstance(leaves, dict):
        return leaves
    out = {below: _turn_module(below, leaf) for below, leaf in leaves.items()}
    if "kernel" in out:
        kernel = out.pop("kernel")
        fan_in = math.prod(kernel.shape[: INPUT_AXES.get(name, 1)])
        out[TURNED] = kernel.reshape(fan_in, -1).T
    return out


def few_rows(x: Float[Array, "*M I"], turned: Float[Array, "O I"]) -> Float[Array, "*M O"]:
    """x Wᵀ in float32, made as (W xᵀ)ᵀ."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(
        turned, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    # XLA would take both transpositions together and have W on the right again.
    return jax.lax.optimization_barrier(out).T.reshape(*x.shape[:-1], -1)
