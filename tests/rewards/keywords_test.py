"""Keywords by hand: whole words, each once, up to a limit."""

import numpy as np
import pytest

from rlhf_jax.rewards.keywords import keyword_share, keywords
from tests.rewards.examples import TOKENIZER, spell


def made(**values):
    return keywords(decode=TOKENIZER.decode, records=lambda source, record: {}, **values)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("They were HAPPY.", 0.5),
        ("happy happy happy", 0.5),  # each once
        ("unhappy, hugging", 0.0),  # whole words
        ('"Happy!" she said.\nA hug...', 1.0),
        ("happy hug don't", 1.0),  # the limit
        ("I don’t; he don't", 0.5),  # one word, whichever apostrophe
    ],
)
def test_by_hand(text, share):
    assert keyword_share(text, ("happy", "hug", "don't"), 2) == share


def test_the_reward_reads_completions_and_not_prompts():
    reward = made(words=("happy", "hug"), limit=2)
    rollouts = spell(["happy hug"], ["a hug", "Happy hug", "none"], group=3)
    scores, _ = reward.score(reward.init(), rollouts)
    np.testing.assert_array_equal(scores.outcome, [0.5, 1.0, 0.0])
    np.testing.assert_array_equal(scores.parts["keywords"], scores.outcome)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(words=()), "wanted single words"),
        (dict(words=("two words",)), "not one: .*two words"),
        (dict(words=("a", "b"), limit=3), "limit=3, wanted 1 to 2"),
        (dict(words=("a", "A"), limit=2), "limit=2, wanted 1 to 1"),
        (dict(words=("a",), limit=0), "limit=0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        made(**values)
