"""A learned advantage: how much better a completion scores than what is expected of its prompt."""

import jax.numpy as jnp

from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.models.heads import EARLY_HEADS
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.masking import last_true, masked_sum
from rlhf_jax.rewards.base import learned_state, outcome_scores
from rlhf_jax.types import Params, Reward, Scores


def advantage_model(
    *,
    model: Model,
    params: Params,
    head: str = "outcome",
    expected: str = "expected",
    rows: int | None = None,
) -> Reward:
    """outcome = a(x, y) = r(x, y) − e(x): `head` at the last token of y, less `expected` at the
    last token of x.

    Where scores have the same level for all prompts, a is r. e does not see y, so a ranks the
    completions of a prompt as r does, and groups that are centred (GRPO, RLOO) are paid the same by
    both; what e takes away is what `normalise`, a clip and a critic would have to bear.
    Peng et al. 2023, https://arxiv.org/abs/2309.10202; see `rlhf_jax.ops.advantage`.

    Args:
        model: as `train_reward` makes it with ``reward.advantage``.
        params: the model's parameters, or its adapters and heads; they become the reward's state.
        head: which of the model's score heads says r.
        expected: the head that says e; "value" is one too.
        rows: completions per chunk, to bound memory; None takes the whole batch at once.

    Example:
        >>> reward = advantage_model(model=model, params=params, rows=8)
        >>> scores, _ = reward.score(reward.init(), rollouts)
    """
    for name, given in (("head", head), ("expected", expected)):
        if given not in model.config.score_heads:
            raise ValueError(
                f"advantage_model: {name}={given!r}, but the model has {model.config.score_heads}"
            )
    if expected not in EARLY_HEADS or head in EARLY_HEADS:
        raise ValueError(
            f"advantage_model: head={head!r}, expected={expected!r}; of these heads only "
            f"{', '.join(EARLY_HEADS)} are read before a completion, and are for expected"
        )

    def score(state, rollouts):
        output = evaluate_completions(
            model, state["params"], state.get("lent_base", {}), rollouts, temperature=1.0, rows=rows
        )
        at_end = masked_sum(output.scores[head], last_true(rollouts.mask), axis=-1)
        # Read where the first token is predicted: at the prompt's last token.
        before = output.scores[expected][:, 0].astype(jnp.float32)
        said = outcome_scores("advantage_model", at_end - before, rollouts)
        parts = {**said.parts, "advantage_model/expected": before}
        return Scores(outcome=said.outcome, process=said.process, parts=parts), state

    def init():
        return learned_state(model, params)

    return Reward(name="advantage_model", where="device", init=init, score=score)
