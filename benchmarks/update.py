"""Training: one PPO update (policy and critic, both 0.5B-shaped) in the compiled update step.

    python -m benchmarks.update [--small]

The share of the matmul ceiling credits useful work only: forward and backward of both networks,
6 FLOP per weight and token and the causal half of attention, nothing for recomputation.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import decode
from benchmarks.ceilings import matmul_rate
from benchmarks.common import (
    median_seconds,
    model_config,
    parse_small,
    peak_gib,
    report,
    rounded,
)
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.mesh import ShardingRules, make_mesh, shard_init
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import decoder
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import Models, create_state
from rlhf_jax.training.update import compile_update, make_update_step
from rlhf_jax.types import Experience, Rollouts, Scores


class Work(NamedTuple):
    """The batch, and into how many microbatches its one minibatch is split."""

    shape: decode.Shape
    microbatches: int


WORK = Work(decode.Shape(64, 4, 128, 384), 4)
SMALL_WORK = Work(decode.Shape(8, 2, 8, 16), 2)


def random_experience(shape: decode.Shape, vocab: int) -> Experience:
    """Rollouts of full length with random tokens and outcomes; log-probs of a uniform policy."""
    key = jax.random.key(2)
    size = (shape.rows, shape.tokens)
    logprobs = jnp.full(size, -math.log(vocab), jnp.float32)
    none = jnp.zeros(size, jnp.float32)
    rollouts = Rollouts(
        prompts=decode.random_prompts(shape, vocab),
        tokens=jax.random.randint(key, size, 0, vocab),
        mask=jnp.ones(size, bool),
        step_ends=jnp.zeros(size, bool),
        logprobs=logprobs,
        behaviour_logprobs=logprobs,
        truncated=jnp.ones(shape.rows, bool),
        sample=jnp.tile(jnp.arange(shape.samples), shape.rows // shape.samples),
        version=jnp.zeros(shape.rows, jnp.int32),
    )
    outcome = jax.random.normal(key, (shape.rows,))
    return Experience(
        rollouts=rollouts,
        scores=Scores(outcome=outcome, process=none, parts={}),
        logprobs=logprobs,
        ref_logprobs=logprobs,
        values=none,
        extra={},
    )


def useful_flops(config: ModelConfig, shape: decode.Shape) -> float:
    """FLOP of one forward and backward pass over all rows.

    6 (weights of the layers) per token, 6 D V per token whose logits are taken, and for causal
    attention 6 L H Dh S² per row (12 without the mask).
    """
    heads, groups = config.heads * config.head_dim, config.kv_heads * config.head_dim
    weights = config.layers * config.width * (2 * heads + 2 * groups + 3 * config.mlp_width)
    length = shape.prompt + shape.tokens
    attention = config.layers * heads * length**2
    logits = config.width * config.vocab_size * shape.tokens if config.lm_head else 0
    return 6.0 * shape.rows * (weights * length + attention + logits)


def measure(small: bool) -> dict[str, Any]:
    """Seconds and tokens per second of an update, and its share of the matmul ceiling."""
    shape, microbatches = SMALL_WORK if small else WORK
    policy = model_config(small, remat="dots")
    value = model_config(small, remat="dots", lm_head=False, score_heads=("value",))
    models = Models(policy=decoder(policy), value=decoder(value))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    algorithm = ppo(kl_coef=0.0)
    optimizers = {role: make_optimizer(learning_rate=1e-6) for role in ("policy", "value")}
    step = make_update_step(
        models,
        algorithm,
        optimizers,
        epochs=1,
        minibatches=1,
        microbatches=microbatches,
        temperature=1.0,
        group_size=shape.samples,
    )
    with jax.set_mesh(mesh):
        params = {
            role: shard_init(model.init, jax.random.key(0), mesh, ShardingRules(), model.axes())
            for role, model in (("policy", models.policy), ("value", models.value))
        }
        state = create_state(models, params, optimizers, algorithm, mesh)
        del params  # the state has copies of its own
        update = compile_update(step, state, mesh)
        experience = random_experience(shape, policy.vocab_size)
        box = [state]  # the state is donated, so each call must hand on the last one's result
        del state
        frozen = {"policy": {}, "value": {}, "reference": {}}
        seconds = median_seconds(functools.partial(_advance, update, box, frozen, experience), 3)
    tokens = shape.rows * (shape.prompt + shape.tokens)
    flops = useful_flops(policy, shape) + useful_flops(value, shape)
    return {
        "seconds": rounded(seconds),
        "tokens_per_s": rounded(tokens / seconds),
        "share_of_matmul_ceiling": rounded(flops / seconds / matmul_rate(small)),
        "tokens": tokens,
        "microbatches": microbatches,
        "peak_gib": peak_gib(),
    }


def _advance(update, box, frozen, experience):
    """One update; checks that it was not skipped, which would be cheaper."""
    box[0], _ = update(box[0], frozen, experience, jax.random.key(3))
    if int(box[0].skipped):
        raise RuntimeError("the update was skipped: its loss or gradient is not finite")
    return box[0]


if __name__ == "__main__":
    small = parse_small(__doc__)
    report("update", small, measure(small))
