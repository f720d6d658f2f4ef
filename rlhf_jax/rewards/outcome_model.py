"""A learned outcome reward: the score of a head at a completion's last token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.masking import last_true, masked_sum
from rlhf_jax.rewards.base import learned_state, outcome_scores
from rlhf_jax.types import Array, Params, Reward

SPACES: dict[str, Callable[[Float[Array, "B"]], Float[Array, "B"]]] = {
    "logit": lambda logit: logit,
    "prob": jax.nn.sigmoid,
}


def outcome_model(
    *,
    model: Model,
    params: Params,
    head: str = "outcome",
    rows: int | None = None,
    space: str = "logit",
) -> Reward:
    """outcome = r(x, y), the logit of `head` at the last token of y, or its sigmoid.

    The last token is the end-of-text token, or, where a completion was truncated, whatever token
    came last (`Rollouts.truncated` flags those).

    Args:
        params: the model's parameters, or its adapters and heads; they become the reward's state.
        head: which of the model's score heads is read.
        rows: completions per chunk, to bound memory; None takes the whole batch at once.
        space: "logit", for preferences, where it may grow without bound; or "prob", where the model
            learnt correctness: bounded, and one that learnt nothing says about the same of all.
            For a blend with a verifier combine the two rewards with their weights.

    Example:
        >>> reward = outcome_model(model=model, params=params, rows=8)
        >>> scores, _ = reward.score(reward.init(), rollouts)
    """
    if head not in model.config.score_heads:
        raise ValueError(
            f"outcome_model: head={head!r}, but the model has {model.config.score_heads}"
        )
    if space not in SPACES:
        raise ValueError(f"outcome_model: space={space!r}; known: {sorted(SPACES)}")

    def score(state, rollouts):
        output = evaluate_completions(
            model, state["params"], state.get("lent_base", {}), rollouts, temperature=1.0, rows=rows
        )
        at_end = masked_sum(output.scores[head], last_true(rollouts.mask), axis=-1)
        scores = SPACES[space](at_end.astype(jnp.float32))
        return outcome_scores("outcome_model", scores, rollouts), state

    def init():
        return learned_state(model, params)

    return Reward(name="outcome_model", where="device", init=init, score=score)
