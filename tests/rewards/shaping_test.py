"""length_penalty, scale and relative: literal numbers, a slow reference, what they remember."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards.base import combine, device_reward, host_reward, length_penalty, relative
from rlhf_jax.rewards.base import scale as scaled
from rlhf_jax.rewards.length import length
from rlhf_jax.types import Reward
from tests.rewards.examples import TOKENIZER, random_rollouts, spell
from tests.rewards.other_tokens_test import policy_rollouts, wrapped

FOUR = spell(["q"], ["a", "bb", "ccc", "dddd"], group=4)  # 2, 3, 4 and 5 tokens


def said(reward, state, outcome):
    """One batch whose outcomes are these: they stand in `version`, which `reads` reads."""
    rollouts = type(FOUR)(**{**vars(FOUR), "logprobs": np.zeros_like(FOUR.logprobs)})
    rollouts.logprobs[:, 0] = outcome
    scores, state = jax.jit(reward.score)(state, rollouts)
    return np.asarray(scores.outcome), state


def reads():
    return device_reward("reads", lambda rollouts: rollouts.logprobs[:, 0])


def test_lppos_reward_is_one_at_its_target_and_nothing_at_twice_the_length():
    rollouts = spell(["q"], ["x" * 19, "x" * 9, "x" * 39], group=3)  # end-of-text is a token
    scores, _ = length(target=20).score({}, rollouts)
    np.testing.assert_allclose(scores.outcome, [1.0, 0.5, 0.0], atol=1e-6)


def test_a_length_penalty_is_in_standard_deviations_of_the_score():
    reward = length_penalty(reads(), tokens=4)
    found, state = said(reward, reward.init(), [1.0, 1.0, 3.0, 3.0])  # standard deviation 1
    np.testing.assert_allclose(found, [1 + 0.5, 1 + 0.25, 3.0, 3 - 0.25], rtol=1e-6)
    # The authors' form: 2 · sd · (1 − .01 · len), now over both batches (deviation sqrt(3.25)).
    code = length_penalty(reads(), tokens=100, coef=2.0)
    state = said(code, code.init(), [1.0, 1.0, 3.0, 3.0])[1]
    found, _ = said(code, state, [4.0, 4.0, 6.0, 6.0])
    deviation = np.std([1, 1, 3, 3, 4, 4, 6, 6])
    wanted = [4, 4, 6, 6] + 2 * deviation * (1 - 0.01 * np.array([2, 3, 4, 5]))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_scores_without_spread_cost_no_length():
    reward = length_penalty(reads(), tokens=1)
    np.testing.assert_array_equal(said(reward, reward.init(), [7.0] * 4)[0], [7.0] * 4)
    reward = scaled(reads())
    np.testing.assert_array_equal(said(reward, reward.init(), [7.0] * 4)[0], [0.0] * 4)


@pytest.mark.parametrize("limit", [0.3, 1.0])
def test_scaling_is_by_the_last_batches_and_forgets_older_ones(limit):
    rng = np.random.default_rng(0)
    batches = [rng.normal(5 * i, 1 + i, 4).astype(np.float32) for i in range(8)]
    reward = scaled(reads(), limit=limit, batches=3)
    state = reward.init()
    for i, batch in enumerate(batches):
        found, state = said(reward, state, batch)
        last = np.concatenate(batches[max(0, i - 2) : i + 1]).astype(np.float64)
        wanted = np.clip((batch - last.mean()) / last.std(), -limit, limit)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_score_that_is_no_number_stays_so_and_out_of_the_statistics():
    reward = scaled(reads(), limit=5.0, batches=2)
    found, state = said(reward, reward.init(), [1.0, 3.0, np.nan, np.inf])
    np.testing.assert_allclose(found, [-1, 1, np.nan, 5])
    found, _ = said(reward, state, [1.0, 3.0, 1.0, 3.0])
    np.testing.assert_allclose(found, [-1, 1, -1, 1], rtol=1e-6)


def test_what_is_remembered_goes_on_from_where_it_was_read_back():
    reward = combine({"a": (scaled(length_penalty(reads(), tokens=4), batches=3), 1.0)})
    state = reward.init()
    for batch in ([1, 2, 3, 4], [0, 0, 5, 5]):
        _, state = said(reward, state, batch)
    read = jax.tree.map(lambda x: jnp.asarray(np.array(x)), state)
    for batch in ([4, 4, 4, 5], [9, 1, 1, 1]):
        one, state = said(reward, state, batch)
        other, read = said(reward, read, batch)
        np.testing.assert_array_equal(one, other)


def test_memory_compiles_once():
    reward = scaled(length_penalty(length(per_token=1.0), tokens=4), batches=2)
    score, state = jax.jit(reward.score), reward.init()
    for seed in range(4):
        _, state = score(state, random_rollouts(seed))
    assert score._cache_size() == 1


def test_a_reward_on_the_host_remembers_as_well():
    def size(prompt, completion, record):
        return len(completion)

    host = host_reward("size", size, decode=TOKENIZER.decode, records=lambda *at: {})
    reward = scaled(host, limit=9.0)
    scores, state = reward.score(reward.init(), FOUR)
    np.testing.assert_allclose(scores.outcome, (np.arange(4) - 1.5) / np.sqrt(1.25), rtol=1e-6)
    np.testing.assert_array_equal(scores.parts["size"], [1, 2, 3, 4])
    assert int(state["ring"]["seen"]) == 1


def test_a_reward_with_tokens_of_its_own_remembers_as_well():
    reward = wrapped(scaled(length(per_token=1.0), limit=9.0, batches=4))
    state = reward.init()
    for batch in range(3):
        _, state = reward.score(state, policy_rollouts())
        assert int(state["ring"]["seen"]) == batch + 1


def beside(reference, **fields):
    """`reads` beside given scores of the reference answers."""
    return relative(
        reads()._replace(**fields),
        references=lambda reward, state: np.asarray(reference, np.float32),
        records=len(reference),
    )


def test_a_relative_reward_is_the_probability_of_beating_the_reference():
    rollouts = spell(["p", "q"], ["a", "b", "c", "d"], group=2, records=[2, 0])
    reward = beside([1.0, 50.0, -2.0])
    rollouts.logprobs[:, 0] = [-2.0, -2 + np.log(3), 1.0, 1e6]
    state = reward.calibrate(reward.init(), rollouts)
    scores, _ = jax.jit(reward.score)(state, rollouts)
    np.testing.assert_allclose(scores.outcome, [0.5, 0.75, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(scores.parts["reads"], rollouts.logprobs[:, 0])


def test_reference_answers_are_asked_of_the_calibrated_reward():
    asked = []

    def references(reward, state):
        asked.append((reward.name, int(state["times"])))
        return np.zeros(3, np.float32)

    inner = Reward(
        name="inner",
        where="device",
        init=lambda: {"times": jnp.zeros((), jnp.int32)},
        score=lambda state, rollouts: (reads().score({}, rollouts)[0], state),
        calibrate=lambda state, rollouts: {"times": state["times"] + 1},
    )
    reward = relative(inner, references=references, records=3)
    reward.calibrate(reward.init(), FOUR)
    assert asked == [("inner", 1)]


def test_bad_values_are_errors():
    for wrap, keys, message in (
        (length_penalty, dict(tokens=0), "tokens=0; wanted 1"),
        (length_penalty, dict(tokens=9, coef=-1.0), "coef=-1.0; wanted a number above 0"),
        (length_penalty, dict(tokens=9, batches=0), "batches=0; wanted 1"),
        (scaled, dict(limit=0.0), "limit=0.0; wanted a number above 0"),
        (scaled, dict(batches=0), "batches=0; wanted 1"),
    ):
        with pytest.raises(ValueError, match=message):
            wrap(reads(), **keys)
    with pytest.raises(ValueError, match="reads learns while the policy does"):
        beside([0.0], update=lambda *given: given)
