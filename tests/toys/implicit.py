"""PRIME's implicit process reward: beta * log-ratio of an online model to its start, per token."""

import jax
import jax.numpy as jnp

from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.ops import masking, preference
from rlhf_jax.ops.metrics import single
from rlhf_jax.rewards.base import process_scores
from rlhf_jax.types import Reward


def implicit(*, model, params, rows, beta: float = 0.05, rate: float = 0.5) -> Reward:
    def logprobs(tree, rollouts):
        out = evaluate_completions(model, tree, {}, rollouts, temperature=1.0, rows=None)
        return out.logprobs

    def ratio(state, rollouts):
        return beta * (logprobs(state["online"], rollouts) - logprobs(state["start"], rollouts))

    def score(state, rollouts):
        process = jnp.where(rollouts.mask, ratio(state, rollouts), 0.0)
        return process_scores("implicit", process), state

    def update(state, rollouts, scores, key):
        label = (scores.outcome > 0.5).astype(jnp.float32)

        def loss(online):
            sums = masking.masked_sum(
                ratio({**state, "online": online}, rollouts), rollouts.mask, -1
            )
            return preference.correctness(sums, label).mean()

        error, gradient = jax.value_and_grad(loss)(state["online"])
        online = jax.tree.map(lambda p, g: p - rate * g, state["online"], gradient)
        return {**state, "online": online}, {"reward/implicit_loss": single(error)}

    start = lambda: {"online": jax.tree.map(jnp.copy, params), "start": params}  # noqa: E731
    return Reward("implicit", "device", start, score, update)
