"""P(yes) behind a completion: against whole texts, on a tiny model; what cannot be asked."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlhf_jax.models.completions import answer_logits, evaluate_texts
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import decoder
from rlhf_jax.rewards.base import lend_base
from rlhf_jax.rewards.generative_model import generative_model
from rlhf_jax.text.question import read_question
from rlhf_jax.text.tokenizer import ByteTokenizer, CharTokenizer
from rlhf_jax.types import Texts
from tests.training.tiny import RULES, config, init, one_device, rollouts

TEXT = CharTokenizer("abcdefgh?yn")  # pad 0, end 1, a..h = 2..9, ? = 10, y = 11, n = 12
ASKED = dict(question="h?", yes="y", no="n")
EOS, QUESTION, YES, NO = 1, [9, 10], 11, 12


@functools.cache
def batch():
    """Six completions of three prompts, the last of which is one token; three are cut off."""
    given = rollouts(3, 2, seed=3)
    mask = np.asarray(given.mask).copy()
    mask[5] = np.arange(mask.shape[1]) < 1
    truncated = np.array([True, False, True, False, True, False])
    last = np.cumsum(mask, 1) == mask.sum(1, keepdims=True)
    tokens = np.where(mask & last & ~truncated[:, None], EOS, np.asarray(given.tokens))
    return dataclasses.replace(given, tokens=tokens, mask=mask, truncated=truncated)


def whole_texts(answer):
    """Prompt, completion without end-of-text, question and answer as rows without padding."""
    given, rows = batch(), []
    for i, (tokens, mask) in enumerate(zip(given.tokens, given.mask, strict=True)):
        n = i // given.group_size
        prompt = np.asarray(given.prompts.tokens)[n][np.asarray(given.prompts.mask)[n]]
        said = tokens[mask] if given.truncated[i] else tokens[mask][:-1]
        rows.append([*prompt, *said, *QUESTION, answer])
    width = max(map(len, rows))
    mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    return Texts(tokens=tokens, mask=mask, loss_mask=mask, segment=mask.astype(np.int32))


def trees(**changes):
    model = decoder(config(layers=1, **changes), RULES)
    return model, init(model, 0, one_device())


def reward_of(model, params, **changes):
    return generative_model(
        model=model, params=params, encode=TEXT.encode, **(ASKED | {"rows": 2} | changes)
    )


@functools.cache
def answers():
    """log P(yes) and log P(no) over the whole vocabulary, of the whole texts."""
    model, params = trees()

    @jax.jit
    def last(texts):
        return evaluate_texts(model, params, {}, texts).logprobs

    found = []
    for answer in (YES, NO):
        texts = whole_texts(answer)
        ends = texts.mask.sum(1) - 1
        found.append(np.asarray(last(texts))[np.arange(len(ends)), ends])
    return found


@pytest.mark.parametrize("rows", [2, None])
def test_the_reward_is_what_the_model_says_behind_the_whole_text(rows):
    yes, no = answers()
    reward = reward_of(*trees(), rows=rows)
    scores, _ = jax.jit(reward.score)(reward.init(), batch())
    among_two = np.exp(yes) / (np.exp(yes) + np.exp(no))
    np.testing.assert_allclose(scores.outcome, among_two, atol=1e-5)
    assert len(set(np.round(among_two, 3))) > 3
    np.testing.assert_array_equal(scores.process, 0)
    logit = reward_of(*trees(), rows=rows, space="logit")
    scores, _ = jax.jit(logit.score)(logit.init(), batch())
    np.testing.assert_allclose(scores.outcome, yes - no, atol=1e-5)


def test_end_of_text_is_not_read():
    """A completion that ended and the same one cut off before its end ask the same question."""
    reward, given = reward_of(*trees()), batch()
    said = np.asarray(given.mask).sum(1)
    open_ended = np.arange(given.mask.shape[1]) < (said - ~given.truncated)[:, None]
    cut = dataclasses.replace(given, mask=open_ended, truncated=np.ones(6, bool))
    score = jax.jit(reward.score)
    expected, found = (score(reward.init(), rows)[0].outcome for rows in (given, cut))
    np.testing.assert_array_equal(expected, found)


def test_adapters_are_asked_on_the_base_that_they_are_lent():
    model, tree = trees(lora_rank=2)
    trained, base = partition(tree, model.config)
    reward = reward_of(model, trained)
    scores, state = jax.jit(reward.score)(lend_base(reward.init(), base), batch())
    whole = reward_of(model, tree)
    expected, _ = jax.jit(whole.score)(whole.init(), batch())
    np.testing.assert_allclose(scores.outcome, expected.outcome, atol=1e-6)
    assert lend_base(state, {})["lent_base"] == {}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(question=""), r"question=\'\' has no tokens"),
        (dict(yes="yn"), r"yes='yn' is 2 tokens \(11, 12\).*set yes to a text that is one"),
        (dict(no=""), r"no='' is 0 tokens"),
        (dict(no="y"), r"yes='y' and no='y' are the same token"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        read_question(TEXT.encode, **(ASKED | asked))


def test_the_usual_words_are_refused_where_they_are_several_tokens():
    with pytest.raises(ValueError, match=r"yes=' Yes' is 4 tokens"):
        read_question(ByteTokenizer().encode)


def test_only_a_language_model_can_be_asked():
    model, params = trees(lm_head=False, score_heads=("outcome",))
    ids = np.array([1, 2], np.int32)
    with pytest.raises(ValueError, match="one model with an LM head"):
        answer_logits(model, params, {}, batch(), ids, ids)
    with pytest.raises(ValueError, match=r"space='odds'; known: \['logit', 'prob'\]"):
        reward_of(*trees(), space="odds")
