"""A language model as an outcome reward: how likely it takes a completion to be right.

Zhang et al. 2024, GenRM (https://arxiv.org/abs/2408.15240), without a chain of thought: the reward
is P(Yes) to a question behind the completion. The model is one of `train_sft` on sources of kind
"verdicts", or any that follows instructions.
"""

import jax.numpy as jnp

from rlhf_jax.models.completions import answer_logits
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards.base import learned_state, outcome_scores
from rlhf_jax.rewards.outcome_model import SPACES
from rlhf_jax.text.question import NO, QUESTION, YES, Encode, read_question
from rlhf_jax.types import Params, Reward


def generative_model(
    *,
    model: Model,
    params: Params,
    encode: Encode,
    question: str = QUESTION,
    yes: str = YES,
    no: str = NO,
    rows: int | None = None,
    space: str = "prob",
) -> Reward:
    """outcome = P(yes | prompt, completion, question) = σ(l_yes − l_no), or l_yes − l_no.

    The probability is among the two answers: what the model gives to other tokens does not count.
    The question stands where the completion's end-of-text token was.

    Args:
        params: the model's parameters, or its adapters; they become the reward's state.
        encode: text -> ids of the model's tokenizer, without special ones.
        question, yes, no: what is asked, and two answers of one token each.
        rows: completions per chunk, to bound memory; None takes the whole batch at once.
        space: "prob", or "logit", l_yes − l_no.

    Raises:
        ValueError: an answer is not one token, or the space is unknown.

    Example:
        >>> reward = generative_model(model=model, params=params, encode=tokenizer.encode)
        >>> scores, _ = reward.score(reward.init(), rollouts)
    """
    if space not in SPACES:
        raise ValueError(f"generative_model: space={space!r}; known: {sorted(SPACES)}")
    asked = read_question(encode, question=question, yes=yes, no=no)

    def score(state, rollouts):
        ids = jnp.array(asked.ids, jnp.int32)
        answers = jnp.array([asked.yes, asked.no], jnp.int32)
        base = state.get("lent_base", {})
        logits = answer_logits(model, state["params"], base, rollouts, ids, answers, rows=rows)
        scores = SPACES[space](logits[:, 0] - logits[:, 1])
        return outcome_scores("generative_model", scores, rollouts), state

    def init():
        return learned_state(model, params)

    return Reward(name="generative_model", where="device", init=init, score=score)
