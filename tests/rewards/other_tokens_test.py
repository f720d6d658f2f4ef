"""A reward model that reads other tokens than the policy: the scores of its own tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from rlhf_jax.rewards.base import combine, device_reward, host_reward
from rlhf_jax.rewards.other_tokens import Writer, carry_back, translated
from rlhf_jax.rewards.outcome_model import outcome_model
from rlhf_jax.rewards.process_model import process_model
from rlhf_jax.text.steps import mark_host_step_ends, token_tables
from rlhf_jax.text.tokenizer import ByteTokenizer, CharTokenizer
from tests.rewards.examples import rollouts_of, spell

CHARS, BYTES = CharTokenizer("0123456789+=\n #"), ByteTokenizer()
PROMPTS = ["1+1=", "12+30="]
COMPLETIONS = ["1\n2", "2\n\n#2", "42", "1\n1\n42\n"]
RECORDS = [{"prompt": text} for text in PROMPTS]


def write(record, completion, truncated):
    prompt = BYTES.encode(record["prompt"])
    end = [] if truncated else [BYTES.eos_ids[0]]
    return [*prompt, *BYTES.encode(completion), *end], len(prompt)


def policy_rollouts():
    """The texts in characters, as a policy with that tokenizer writes them."""
    end = CHARS.eos_ids[0]
    made = rollouts_of(
        [CHARS.encode(text) for text in PROMPTS],
        [[*CHARS.encode(text), end] for text in COMPLETIONS],
        group=2,
    )
    made = changed(made, tokens=np.where(made.mask, made.tokens, CHARS.pad_id))
    ends = mark_host_step_ends(made.tokens, made.mask, token_tables(CHARS))
    return jax.tree.map(jnp.asarray, changed(made, step_ends=ends))


def changed(rollouts, **fields):
    return dataclasses.replace(rollouts, **fields)


def byte_rollouts():
    """The same texts in bytes, made apart from the code under test."""
    made = spell(PROMPTS, COMPLETIONS, group=2)
    ends = mark_host_step_ends(made.tokens, made.mask, token_tables(BYTES))
    return changed(made, step_ends=ends)


def wrapped(inner, **sizes):
    writer = Writer(
        write,
        BYTES.encode,
        token_tables(BYTES, vocab_size=260),
        **{"max_prompt": 8, "max_tokens": 9} | sizes,
    )
    return translated(
        inner, writer, decode=CHARS.decode, records=lambda source, record: RECORDS[record]
    )


def learned(factory, head):
    config = named_size("tiny", lm_head=False, score_heads=(head,), vocab_size=260)
    model = decoder(config)
    return factory(model=model, params=jax.jit(model.init)(jax.random.key(0)), head=head)


def test_an_outcome_model_says_what_it_says_on_its_own_tokens():
    inner = learned(outcome_model, "outcome")
    reward = wrapped(inner)
    assert reward.where == "host"
    scores, state = reward.score(reward.init(), policy_rollouts())
    wanted, _ = inner.score(inner.init(), byte_rollouts())
    np.testing.assert_allclose(scores.outcome, wanted.outcome, atol=1e-5)
    np.testing.assert_array_equal(scores.parts["outcome_model/cut"], 0)
    assert jax.tree.structure(state) == jax.tree.structure(inner.init())
    assert len(np.unique(np.round(wanted.outcome, 4))) == 4


def test_step_scores_come_back_to_the_policys_step_ends():
    inner = learned(process_model, "process")
    rollouts, theirs = policy_rollouts(), byte_rollouts()
    scores, _ = wrapped(inner).score(inner.init(), rollouts)
    wanted, _ = inner.score(inner.init(), theirs)
    for row in range(4):
        got = np.asarray(scores.process[row])[np.asarray(rollouts.step_ends[row])]
        np.testing.assert_allclose(got, wanted.process[row][theirs.step_ends[row]], atol=1e-5)
        assert not np.asarray(scores.process[row])[~np.asarray(rollouts.step_ends[row])].any()
    assert [int(n) for n in rollouts.step_ends.sum(1)] == [2, 2, 1, 3]


def test_what_is_longer_than_a_row_is_cut_and_counted():
    seen = []

    def look(rollouts):
        seen.append(rollouts.mask.shape)
        return rollouts.mask.sum(-1) * 100.0 + rollouts.truncated

    reward = wrapped(device_reward("look", look), max_tokens=4)
    scores, _ = reward.score(reward.init(), policy_rollouts())
    assert seen == [(4, 4)]
    # "1\\n2" and "42" with end-of-text fit into 4 tokens; the others do not.
    np.testing.assert_array_equal(scores.parts["look/cut"], [0, 1, 0, 1])
    np.testing.assert_array_equal(scores.outcome, [400, 401, 300, 401])


def test_it_is_a_reward_on_the_host_among_others():
    reward = wrapped(learned(outcome_model, "outcome"))
    length = host_reward(
        "length", lambda prompt, completion, record: len(completion), decode=CHARS.decode,
        records=lambda source, record: RECORDS[record],
    )  # fmt: skip
    both = combine({"model": (reward, 1.0), "length": (length, 0.5)})
    scores, _ = both.score(both.init(), policy_rollouts())
    np.testing.assert_allclose(
        scores.outcome, scores.parts["model"] + 0.5 * np.array([3, 5, 2, 7]), atol=1e-5
    )


def test_an_online_reward_is_refused():
    inner = learned(outcome_model, "outcome")._replace(update=lambda *_: None)
    with pytest.raises(ValueError, match="cannot read texts of another tokenizer"):
        wrapped(inner)


@pytest.mark.parametrize(
    ("theirs", "ours", "wanted"),
    [
        ([0, 1, 0, 1], [1, 0, 1, 0], [2, 0, 4, 0]),
        ([1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 6]),  # the third goes to the last
        ([0, 0, 0, 1], [1, 0, 0, 1], [4, 0, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]),
    ],
)
def test_carry_back(theirs, ours, wanted):
    process = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    got = carry_back(process, jnp.array([theirs], bool), jnp.array([ours], bool))
    np.testing.assert_array_equal(got[0], wanted)
