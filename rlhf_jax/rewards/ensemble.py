"""A learned outcome reward from several models: their scores on one scale, combined."""

import jax
import jax.numpy as jnp

from rlhf_jax.models.completions import evaluate_completions, member_name
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.ensemble import (
    combine_members,
    disagreement,
    member_statistics,
    standardise_members,
)
from rlhf_jax.ops.masking import last_true, masked_sum
from rlhf_jax.rewards.base import learned_state, outcome_scores
from rlhf_jax.types import Params, Reward, Scores


def ensemble(
    *,
    model: Model,
    params: Params,
    head: str = "outcome",
    rows: int | None = None,
    how: str = "mean",
    coef: float = 0.5,
) -> Reward:
    """outcome = A((r_1 − m_1) / s_1, ..., (r_E − m_E) / s_E) at the last token of a completion.

    m and s are each member's mean and standard deviation over samples of the initial policy, frozen
    by `calibrate`; before it they are 0 and 1. A is one of `combine_members`. ``parts`` also have
    ``disagreement``, the standard deviation of the members' standardised scores.

    Args:
        model: an ensemble, as `train_reward` makes it with ``reward.members``.
        params: those of all members, or their adapters and heads; they become the reward's state.
        head: which of the model's score heads is read.
        rows: completions per chunk, to bound memory; None takes the whole batch at once.
        how: "mean", "lcb" (mean − coef · std), "worst" or "uwo" (mean − coef · variance).
        coef: what a unit of standard deviation (lcb) or variance (uwo) costs.

    Example:
        >>> reward = ensemble(model=model, params=params, how="worst", rows=8)
        >>> scores, _ = reward.score(reward.calibrate(reward.init(), first), rollouts)
    """
    members = model.config.members
    if head not in model.config.score_heads:
        raise ValueError(f"ensemble: head={head!r}, but the model has {model.config.score_heads}")
    if members == 1:
        raise ValueError("ensemble: this is one model; name the reward 'outcome_model' for it")
    one = jax.ShapeDtypeStruct((members, 1), jnp.float32)
    jax.eval_shape(lambda x: combine_members(x, how, coef=coef), one)  # raises what is wrong

    def member_scores(state, rollouts):
        output = evaluate_completions(
            model, state["params"], state.get("lent_base", {}), rollouts, temperature=1.0, rows=rows
        )
        said = jnp.stack([output.scores[member_name(head, n)] for n in range(members)])
        return jax.vmap(lambda one: masked_sum(one, last_true(rollouts.mask), axis=-1))(said)

    def init():
        frozen = {"mean": jnp.zeros(members), "std": jnp.ones(members)}
        return {**learned_state(model, params), **frozen}

    def score(state, rollouts):
        scores = member_scores(state, rollouts)
        scores = standardise_members(scores, state["mean"], state["std"])
        said = outcome_scores("ensemble", combine_members(scores, how, coef=coef), rollouts)
        parts = {**said.parts, "ensemble/disagreement": disagreement(scores)}
        return Scores(outcome=said.outcome, process=said.process, parts=parts), state

    def calibrate(state, rollouts):
        mean, std = member_statistics(member_scores(state, rollouts))
        return {**state, "mean": mean, "std": std}

    return Reward(name="ensemble", where="device", init=init, score=score, calibrate=calibrate)
