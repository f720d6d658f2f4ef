"""A learned process reward: what each step of a solution adds.

Summing non-negative step scores pays for more steps: a policy that repeats a trivial correct step
would gain. The default form telescopes instead, so what a completion is paid in all depends on
where it ends and not on how many steps it took.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.masking import fill_padding, masked_mean
from rlhf_jax.rewards.base import learned_state, process_scores
from rlhf_jax.types import Array, Params, Reward

Transform = Callable[[Float[Array, "B T"], Bool[Array, "B T"], int], Float[Array, "B T"]]


def delta(
    logits: Float[Array, "B T"], ends: Bool[Array, "B T"], group_size: int
) -> Float[Array, "B T"]:
    """σ(r_s) − σ(r_{s−1}) at step s; before the first step stands the group's mean of σ(r_1).

    The sum over a completion is σ(last) − mean of σ(first), whatever the number of steps, and
    first steps alone pay 0 on average over a group.
    """
    prob = fill_padding(jax.nn.sigmoid(fill_padding(logits, ends)), ends)
    rows, width = prob.shape
    column = jax.lax.broadcasted_iota(jnp.int32, prob.shape, 1)
    upto = jax.lax.cummax(jnp.where(ends, column, -1), axis=1)
    before = jnp.concatenate([jnp.full((rows, 1), -1), upto[:, :-1]], axis=1)  # [B T]
    first = ends & (before < 0)
    of_group = (rows // group_size, group_size * width)
    start = masked_mean(prob.reshape(of_group), first.reshape(of_group), axis=-1)
    start = jnp.broadcast_to(jnp.repeat(start, group_size)[:, None], prob.shape)
    previous = jnp.take_along_axis(prob, jnp.maximum(before, 0), axis=1)
    return fill_padding(prob - jnp.where(first, start, previous), ends)


def prob(logits, ends, group_size):
    """σ(r_s). Non-negative: pays for more steps."""
    del group_size
    return fill_padding(jax.nn.sigmoid(fill_padding(logits, ends)), ends)


def prob_per_step(logits, ends, group_size):
    """σ(r_s) / S, so that the sum is the mean over the S steps."""
    steps = jnp.maximum(jnp.sum(ends, axis=-1, keepdims=True, dtype=jnp.float32), 1.0)
    return prob(logits, ends, group_size) / steps


def centred(logits, ends, group_size):
    """σ(r_s) − 1/2: steps that are likelier wrong than right cost."""
    return fill_padding(prob(logits, ends, group_size) - 0.5, ends)


def logit(logits, ends, group_size):
    """r_s itself."""
    del group_size
    return fill_padding(logits, ends)


TRANSFORMS: dict[str, Transform] = {
    "delta": delta,
    "prob": prob,
    "prob_per_step": prob_per_step,
    "centred": centred,
    "logit": logit,
}


def process_model(
    *,
    model: Model,
    params: Params,
    head: str = "process",
    rows: int | None = None,
    transform: str = "delta",
) -> Reward:
    """process_t = f(r_s) at the last token of step s, 0 elsewhere; r_s is the logit of `head`.

    Where a completion was truncated, its last token ends its last step
    (`Rollouts.truncated` flags those).

    Args:
        params: the model's parameters, or its adapters and heads; they become the reward's state.
        head: which of the model's score heads is read.
        rows: completions per chunk, to bound memory; None takes the whole batch at once.
        transform: f, one of `TRANSFORMS`.
    """
    if head not in model.config.score_heads:
        raise ValueError(
            f"process_model: head={head!r}, but the model has {model.config.score_heads}"
        )
    if transform not in TRANSFORMS:
        raise ValueError(f"process_model: transform={transform!r}; known: {sorted(TRANSFORMS)}")

    def score(state, rollouts):
        output = evaluate_completions(
            model, state["params"], state.get("lent_base", {}), rollouts, temperature=1.0, rows=rows
        )
        ends = rollouts.step_ends & rollouts.mask
        paid = TRANSFORMS[transform](
            output.scores[head].astype(jnp.float32), ends, rollouts.group_size
        )
        return process_scores("process_model", paid), state

    def init():
        return learned_state(model, params)

    return Reward(name="process_model", where="device", init=init, score=score)
