"""A learned process reward without step labels: how far a model moved from its reference.

Cui et al. 2025 (PRIME), https://arxiv.org/abs/2502.01456; Yuan et al. 2024,
https://arxiv.org/abs/2412.01981. The model is a policy that `train_dpo` trained, from pairs or from
answers that are right or wrong, or one that starts as its own reference and learns here, beside
the policy that it pays.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.models.completions import evaluate_chunk, evaluate_completions, split_rollouts
from rlhf_jax.models.lora import join
from rlhf_jax.models.transformer import Model, decoder
from rlhf_jax.ops.implicit import step_rewards, token_rewards
from rlhf_jax.ops.masking import masked_sum, mean_of
from rlhf_jax.ops.preference import correctness
from rlhf_jax.pytree import pytree
from rlhf_jax.rewards.base import learned_state, process_scores
from rlhf_jax.types import Array, Learner, Params, Reward, Rollouts, Term

PER = ("token", "step")


@pytree
class _Chunk:
    """Completions with their labels and what the reference says of them."""

    rollouts: Rollouts
    right: Bool[Array, " B"]
    reference: Float[Array, "B T"]


def implicit_model(
    *,
    model: Model,
    params: Params,
    reference: Params | None = None,
    learner: Learner | None = None,
    rows: int | None = None,
    beta: float = 0.05,
    per: str = "token",
    label: str = "",
    threshold: float = 0.5,
) -> Reward:
    """process_t = r_t = β (log π_ψ(y_t) − log π_ref(y_t)), at temperature 1.

    With a `learner` the model takes one step after every update of the policy, on the same
    completions, z being whether another reward's part of them is above a threshold:

        L = mean over completions of  −[z log σ(R) + (1 − z) log σ(−R)],   R = Σ_t r_t

    Metrics of it: ``loss``, ``accuracy`` ("R > 0" against z), ``accuracy_right``,
    ``accuracy_wrong``, ``right`` (the share of z), ``reward_right`` and ``reward_wrong`` (mean R),
    ``grad_norm``, ``skipped``, ``skipped_in_row``. Scores of a batch are from before its step.

    Args:
        params: the model's parameters, or its adapters; they become the reward's state.
        reference: the parameters of π_ref, a whole model without adapters, in the state too. None
            where `params` are adapters: then it is the base under them, and lent as that is.
        learner: how a step is taken; None leaves the model as it is.
        rows: completions per chunk, to bound memory; None takes the whole batch at once.
        beta: β, what it was trained with.
        per: "token", or "step": Σ r_t over a step stands at the step's last token, for what reads
            scores of steps. The sum over a completion is the same.
        label: the reward, by its label in the config, that says which completions are right.
        threshold: a score of it above this is right.

    Example:
        >>> reward = implicit_model(model=model, params=params, reference=start, rows=8)
        >>> scores, _ = reward.score(reward.init(), rollouts)
    """
    _check(model, params, reference, learner, beta, per, label)
    plain = decoder(dataclasses.replace(model.config, lora_rank=0), model.rules)

    def logprobs(asked, tree, base, rollouts):
        output = evaluate_completions(asked, tree, base, rollouts, temperature=1.0, rows=rows)
        return output.logprobs

    def before(state, rollouts):
        tree = state["reference"] if "reference" in state else state["lent_base"]
        return logprobs(plain, tree, {}, rollouts)

    def score(state, rollouts):
        now = logprobs(model, state["params"], state.get("lent_base", {}), rollouts)
        paid = token_rewards(now, before(state, rollouts), rollouts.mask, beta=beta)
        if per == "step":
            paid = step_rewards(paid, rollouts.step_ends & rollouts.mask)
        return process_scores("implicit_model", paid), state

    def init():
        state = learned_state(model, params)
        state |= {} if reference is None else {"reference": reference}
        return state | ({} if learner is None else {"optimizer": learner.init(params)})

    def update(state, rollouts, scores, key):
        del key  # nothing in it is random
        if label not in scores.parts:
            raise ValueError(f"label={label!r} is no reward; rewards: {sorted(scores.parts)}")
        right = scores.parts[label] > threshold
        batch = _Chunk(rollouts=rollouts, right=right, reference=before(state, rollouts))
        total = rollouts.tokens.shape[0]
        chunks = split_rollouts(batch, 1 if rows is None else total // rows)
        base = state.get("lent_base", {})

        def forward(own, chunk):
            return evaluate_chunk(model, join(own, base), chunk.rollouts, 1.0).logprobs

        loss = functools.partial(_loss, beta)
        own, moved, found = learner.step(state["params"], state["optimizer"], forward, loss, chunks)
        return {**state, "params": own, "optimizer": moved}, found

    return Reward(
        name="implicit_model",
        where="device",
        init=init,
        score=score,
        update=None if learner is None else update,
    )


def _check(model, params, reference, learner, beta, per, label) -> None:
    """Raises a ValueError for what cannot be a log-ratio or its training."""
    if not model.config.lm_head:
        raise ValueError("implicit_model: the model has no LM head; its log-probs are the reward")
    if not beta > 0:
        raise ValueError(f"implicit_model: beta={beta}; wanted more than 0, such as 0.05")
    if per not in PER:
        raise ValueError(f"implicit_model: per={per!r}; known: {', '.join(PER)}")
    if reference is None and "lent_base" not in learned_state(model, params):
        raise ValueError("implicit_model: reference is missing; only adapters have one under them")
    if (learner is None) == bool(label):
        raise ValueError(
            f"implicit_model: label={label!r} says which completions are right for a model that "
            "learns; give it with an optimizer, or neither"
        )


def _loss(beta, logprobs, chunk):
    """The term and the metrics of a chunk; completions without a token do not count."""
    mask = chunk.rollouts.mask
    total = masked_sum(token_rewards(logprobs, chunk.reference, mask, beta=beta), mask, axis=-1)
    present = jnp.any(mask, axis=-1)
    right, agrees = chunk.right, (total > 0) == chunk.right
    error = mean_of(correctness(total, right.astype(jnp.float32)), present)
    return {"correctness": Term(weight=1.0, mean=error)}, {
        "accuracy": mean_of(agrees, present),
        "accuracy_right": mean_of(agrees, present & right),
        "accuracy_wrong": mean_of(agrees, present & ~right),
        "right": mean_of(right, present),
        "reward_right": mean_of(total, present & right),
        "reward_wrong": mean_of(total, present & ~right),
    }
