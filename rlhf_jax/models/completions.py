"""What a model says about given completions and texts: the facade that everybody else uses.

Scoring before the update and the forward pass inside the update are one function on chunks of
one shape. Matrix products round differently for different shapes: scoring all rows at once and
updating in microbatches gives ratios other than 1 on most tokens (2.7e-5 in float32), in equal
chunks the first ratio is exactly 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from rlhf_jax.models.heads import EARLY_HEADS, EXPECTED_HEAD, OUTCOME_HEAD
from rlhf_jax.models.lora import join
from rlhf_jax.models.members import each_member
from rlhf_jax.models.passes import Layout
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.groups import join_chunks, repeat_groups, split_chunks
from rlhf_jax.ops.logprobs import chunked_logprobs
from rlhf_jax.ops.masking import last_true, masked_sum
from rlhf_jax.pytree import pytree
from rlhf_jax.types import Array, CompletionOutput, Params, Rollouts, Texts


@pytree
class TextOutput:
    """Log-probability of each token given those before it (0 in the first column and at
    padding), and what each head says at the token; of an ensemble see `by_name`."""

    logprobs: Float[Array, "M S"] | None
    scores: dict[str, Float[Array, "M S"]]


def evaluate_completions(
    model: Model,
    params: Params,
    frozen: Params,
    rollouts: Rollouts,
    *,
    temperature: Float[Array, ""] | float,
    rows: int | None,
) -> CompletionOutput:
    """Log-probs, entropy and scores of completions, in chunks of `rows` rows.

    Args:
        params: the trainable part of the parameters (all of them without adapters).
        frozen: the part that does not train; {} without adapters.
        temperature: logits are divided by it, as in sampling; 0 counts as 1.
        rows: rows per chunk, a multiple of the group size; the update's microbatch, so that
            both see the same shapes. None = all rows at once.
    """
    tree = join(params, frozen)
    return _by_rows(lambda chunk: evaluate_chunk(model, tree, chunk, temperature), rollouts, rows)


def _by_rows(read: Callable[[Rollouts], Any], rollouts: Rollouts, rows: int | None) -> Any:
    """What `read` says of rollouts, asked in chunks of `rows` rows; None = all at once."""
    total = rollouts.tokens.shape[0]
    if rows is None or rows == total:
        return read(rollouts)
    group = rollouts.group_size
    if rows < 1 or total % rows or rows % group:
        raise ValueError(
            f"rows={rows} does not cut {total} rollouts into equal chunks of whole groups of "
            f"{group}; want a divisor of {total} that is a multiple of {group}"
        )
    out = jax.lax.map(read, split_rollouts(rollouts, total // rows))
    return join_chunks(out, group)


def split_rollouts(tree: Any, chunks: int) -> Any:
    """The tree with a leading axis of chunks that hold whole groups and their prompts.

    Args:
        tree: `Rollouts`, or what holds them beside more of their rows: leaves of N rows (the
            prompts' own) and of N·K.
    """
    prompts = min(x.shape[0] for x in jax.tree.leaves(tree))
    # Rows per prompt: 1 for the prompts' own leaves, K for the others.
    return jax.tree.map(lambda x: split_chunks(x, chunks, x.shape[0] // prompts), tree)


def evaluate_chunk(
    model: Model, tree: Params, rollouts: Rollouts, temperature: Float[Array, ""] | float
) -> CompletionOutput:
    """One forward pass over prompts, each read once for all its samples, and completions; numbers
    at padding are 0.

    Token t lies in column P+t and is predicted in column P+t-1: there log-prob, entropy and
    the heads that expect something (value, expected) are read. All others are read at the token.

    Scores of an ensemble are named as in `by_name`.
    """
    if model.config.members > 1:
        scores = each_member(
            lambda one: _evaluate_one(model, one, rollouts, temperature).scores, tree, model.config
        )
        return CompletionOutput(logprobs=None, entropy=None, scores=by_name(scores))
    return _evaluate_one(model, tree, rollouts, temperature)


def _evaluate_one(model, tree, rollouts, temperature) -> CompletionOutput:
    config = model.config
    states = _behind_prompts(model, tree, rollouts, rollouts.tokens, rollouts.mask)

    def zero_padding(x):
        return jnp.where(rollouts.mask, x, 0.0)

    logprobs = entropy = None
    if config.lm_head:
        logprobs, entropy = chunked_logprobs(
            states.before,
            lambda chunk: model.logits(tree, chunk),
            rollouts.tokens,
            temperature=temperature,
            chunk=config.logprob_chunk,
            keep_logits=config.keep_logits,
        )
        logprobs, entropy = zero_padding(logprobs), zero_padding(entropy)
    scores = {}
    early = [name for name in config.score_heads if name in EARLY_HEADS]
    late = [name for name in config.score_heads if name not in EARLY_HEADS]
    for names, hidden in ((early, states.before), (late, states.own)):
        if names:
            read = model.scores(tree, hidden)
            scores |= {name: read[name] for name in names}
    scores = {name: zero_padding(score) for name, score in scores.items()}
    return CompletionOutput(logprobs=logprobs, entropy=entropy, scores=scores)


class Behind(NamedTuple):
    """Final hidden states of prompts, of the tokens behind them, and of the one before each.

    prompts: of a prompt's last column alone, where the others were not asked for.
    """

    prompts: Float[Array, "N P D"] | Float[Array, "N 1 D"]
    own: Float[Array, "B T D"]
    before: Float[Array, "B T D"]


def _behind_prompts(model, tree, rollouts, tokens, mask, *, whole_prompts=False) -> Behind:
    """One pass over prompts with `tokens` [B T] behind them; each prompt is read once for all K
    rows of its group, which lie one after the other in its row (see `full_pass`)."""
    prompts, group = rollouts.prompts, rollouts.group_size
    start = prompts.tokens.shape[1]
    since = 0 if whole_prompts else start - 1
    before = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
    positions = repeat_groups(before, group)[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    positions = jnp.maximum(positions - 1, 0)

    def rows(of_prompts, own):
        own = jnp.reshape(own, (of_prompts.shape[0], -1))
        return jnp.concatenate([of_prompts, own], axis=1)  # [N P+KT]

    hidden = model.apply(
        tree,
        rows(prompts.tokens, tokens),
        rows(positions_of(prompts.mask), positions),
        rows(prompts.mask, mask),
        None,
        Layout(start, group) if group > 1 else None,
        since=since,
    ).hidden
    first, own = hidden[:, : start - since], hidden[:, start - since :]
    if group == 1:
        return Behind(first, own, before=hidden[:, start - since - 1 : -1])
    own = jnp.reshape(own, (*tokens.shape, hidden.shape[2]))
    last = repeat_groups(first[:, -1:], group)
    return Behind(first, own, before=jnp.concatenate([last, own[:, :-1]], axis=1))


def positions_of(mask: Array) -> Int[Array, "B S"]:
    """The position of each token among its row's real tokens, wherever the padding lies."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def evaluate_texts(model: Model, params: Params, frozen: Params, texts: Texts) -> TextOutput:
    """Log-probs (temperature 1) and scores of whole texts; numbers at padding are 0.

    One document per row: attention does not stop at the borders of packed documents.
    """
    tree = join(params, frozen)
    if model.config.members > 1:
        scores = member_texts(model, params, frozen, texts, own=False)
        return TextOutput(logprobs=None, scores=by_name(scores))
    return _texts_of_one(model, tree, texts)


def embed_completions(
    model: Model, params: Params, frozen: Params, rollouts: Rollouts
) -> Float[Array, "B D"]:
    """The mean of the final hidden states (after the last norm) over prompt and completion.

    Raises:
        ValueError: the model is an ensemble, whose members have states of their own.
    """
    if model.config.members > 1:
        raise ValueError(f"{model.config.members} models have no embedding in common; name one")
    tree = join(params, frozen)
    given = (rollouts.tokens, rollouts.mask)
    states = _behind_prompts(model, tree, rollouts, *given, whole_prompts=True)

    def of(hidden, mask):
        """Their sum [B D], and how many there are [B 1]."""
        total = jnp.sum(jnp.where(mask[:, :, None], hidden, 0.0), axis=1)
        return total, jnp.sum(mask, axis=1, dtype=jnp.float32)[:, None]

    prompts = of(states.prompts, rollouts.prompts.mask)
    prompts = jax.tree.map(lambda x: repeat_groups(x, rollouts.group_size), prompts)
    total, count = jax.tree.map(jnp.add, prompts, of(states.own, rollouts.mask))
    return total / jnp.maximum(count, 1.0)


def answer_logits(
    model: Model,
    params: Params,
    frozen: Params,
    rollouts: Rollouts,
    question: Int[Array, " Q"],
    answers: Int[Array, " A"],
    *,
    rows: int | None = None,
) -> Float[Array, "B A"]:
    """Logits of tokens as the answer to a question that stands behind each completion.

    The question takes the place of the end-of-text token, where there is one.

    Args:
        question: ids, as they stand in the text.
        answers: the ids whose logits are wanted.
        rows: see `evaluate_completions`.

    Raises:
        ValueError: the model has no LM head, or is an ensemble, whose members have no such head.
    """
    if not model.config.lm_head or model.config.members > 1:
        raise ValueError("a question wants one model with an LM head, whose tokens answer it")
    tree, size = join(params, frozen), question.shape[0]

    def read(chunk: Rollouts) -> Float[Array, "B A"]:
        said = jnp.sum(chunk.mask, axis=1, dtype=jnp.int32)  # [B]
        said = said - ((said > 0) & ~chunk.truncated)  # without end-of-text
        width = chunk.tokens.shape[1] + size
        place = jnp.arange(width, dtype=jnp.int32)[None, :] - said[:, None]  # in the question
        asked = question[jnp.clip(place, 0, size - 1)]
        tokens = jnp.where(place < 0, jnp.pad(chunk.tokens, ((0, 0), (0, size))), asked)
        own = _behind_prompts(model, tree, chunk, tokens, place < size).own  # [B T+Q D]
        last = (said + size - 1)[:, None, None]
        states = jnp.take_along_axis(own, last, axis=1)[:, 0]  # [B D]
        return model.logits(tree, states)[:, answers].astype(jnp.float32)

    return _by_rows(read, rollouts, rows)


def member_texts(
    model: Model, params: Params, frozen: Params, texts: Texts, *, own: bool
) -> dict[str, Float[Array, "E M S"]]:
    """What each member of an ensemble says of whole texts, by head; 0 at padding.

    Args:
        own: every member has texts of its own, leaves [E M S]; else all read the same [M S].
    """

    def scores(one, given=texts):
        return _texts_of_one(model, one, given).scores

    by_member = (texts,) if own else ()
    return each_member(scores, join(params, frozen), model.config, *by_member)


def before_completion(texts: Texts) -> Bool[Array, "M S"]:
    """True at the last token of each text's prompt, where what is expected of it is read: the one
    before the first that trains. Rows without a completion have none."""
    column = jax.lax.broadcasted_iota(jnp.int32, texts.mask.shape, 1)
    trains = jnp.asarray(texts.loss_mask) & texts.mask
    first = jnp.argmax(trains, axis=-1, keepdims=True)
    return (column == first - 1) & jnp.any(trains, axis=-1, keepdims=True)


def expected_scores(scores: dict[str, Float[Array, "M S"]], texts: Texts) -> Float[Array, " M"]:
    """What an advantage model expects of each text's prompt; 0 for rows of padding."""
    return masked_sum(scores[EXPECTED_HEAD], before_completion(texts), axis=-1)


def text_scores(
    scores: dict[str, Float[Array, "M S"]], texts: Texts, head: str
) -> Float[Array, " M"]:
    """What a model says of whole texts: a head at their last tokens, 0 for rows of padding.

    The outcome head of an advantage model is read as a(x, y) = r(x, y) − e(x).
    """
    at_end = masked_sum(scores[head], last_true(texts.mask), axis=-1)
    if head == OUTCOME_HEAD and EXPECTED_HEAD in scores:
        return at_end - expected_scores(scores, texts)
    return at_end


def member_name(head: str, number: int) -> str:
    """The name under which an ensemble's output has one member's score of a head."""
    return f"{head}/{number}"


def by_name(scores: dict[str, Float[Array, "E ..."]]) -> dict[str, Float[Array, "..."]]:
    """An ensemble's scores: the mean over members under the head's name, members behind it.

    So whoever reads a head of a model reads the mean of an ensemble's.
    """
    named = {}
    for head, of_members in scores.items():
        named[head] = jnp.mean(of_members, axis=0)
        named |= {member_name(head, number): one for number, one in enumerate(of_members)}
    return named


def _texts_of_one(model, tree, texts) -> TextOutput:
    config = model.config
    tokens, mask = texts.tokens, texts.mask
    hidden = model.apply(tree, tokens, positions_of(mask), mask, None).hidden
    logprobs = None
    if config.lm_head:
        # The last column predicts a token that does not exist; its number is dropped.
        following = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
        ahead, _ = chunked_logprobs(
            hidden,
            lambda states: model.logits(tree, states),
            following,
            temperature=1.0,
            chunk=config.logprob_chunk,
            keep_logits=config.keep_logits,
        )
        seen = jnp.concatenate([jnp.zeros_like(mask[:, :1]), mask[:, :-1]], axis=1)
        logprobs = jnp.concatenate([jnp.zeros_like(ahead[:, :1]), ahead[:, :-1]], axis=1)
        logprobs = jnp.where(mask & seen, logprobs, 0.0)
    read = model.scores(tree, hidden)
    scores = {name: jnp.where(mask, score, 0.0) for name, score in read.items()}
    return TextOutput(logprobs=logprobs, scores=scores)
