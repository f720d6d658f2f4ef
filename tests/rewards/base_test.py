"""Rewards as values: weights, parts, places, states by label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.metrics import value
from rlhf_jax.rewards.base import (
    add_scores,
    combine,
    device_reward,
    host_reward,
    process_scores,
    split_places,
)
from rlhf_jax.types import Mean, Reward
from tests.rewards.examples import TOKENIZER, random_rollouts, spell


def tokens_reward(scale=1.0):
    return device_reward("tokens", lambda rollouts: scale * rollouts.mask.sum(-1))


def column_reward():
    """Pays the column number at every step end."""

    def score(state, rollouts):
        columns = jnp.arange(rollouts.mask.shape[1], dtype=jnp.float32)[None, :]
        return process_scores("columns", jnp.where(rollouts.step_ends, columns, 0.0)), state

    return Reward(name="columns", where="device", init=dict, score=score)


def letters_reward(letter, decode=TOKENIZER.decode):
    return host_reward(
        "letters",
        lambda prompt, completion, record: completion.count(letter),
        decode=decode,
        records=lambda source, record: {},
    )


def test_combine_weighs_and_adds_and_keeps_parts_unweighted_by_label():
    rollouts = spell(["q"], ["aa\n", "bbbb"], group=2)
    reward = combine({"cost": (tokens_reward(), -0.25), "steps": (column_reward(), 2.0)})
    scores, state = reward.score(reward.init(), rollouts)
    # 4 and 5 tokens with the end of text; one step each, which ends in column 3 and 4.
    np.testing.assert_array_equal(scores.outcome, [-1.0, -1.25])
    np.testing.assert_array_equal(scores.process, [[0, 0, 0, 6, 0], [0, 0, 0, 0, 8]])
    assert sorted(scores.parts) == ["cost", "steps"]
    np.testing.assert_array_equal(scores.parts["cost"], [4.0, 5.0])
    np.testing.assert_array_equal(scores.parts["steps"], [3.0, 4.0])
    assert state == {"cost": {}, "steps": {}}


def test_weight_zero_is_a_metric_and_enters_no_sum():
    rollouts = spell(["q"], ["aa", "ab"], group=2)
    broken = device_reward("broken", lambda rollouts: jnp.full(2, jnp.inf))
    reward = combine({"cost": (tokens_reward(), -1.0), "watched": (broken, 0.0)})
    scores, _ = reward.score(reward.init(), rollouts)
    np.testing.assert_array_equal(scores.outcome, [-3.0, -3.0])
    np.testing.assert_array_equal(scores.parts["watched"], [np.inf, np.inf])
    # Alone on its place it gives zeros of the right shape, so that places can be added.
    alone = combine({"letters": (letters_reward("a"), 0.0)})
    watched, _ = alone.score(alone.init(), rollouts)
    np.testing.assert_array_equal(watched.parts["letters"], [2.0, 1.0])
    np.testing.assert_array_equal(add_scores(scores, watched).outcome, scores.outcome)
    np.testing.assert_array_equal(watched.process, np.zeros(rollouts.mask.shape))


def test_fractions_survive_and_scores_are_float32():
    rollouts = random_rollouts(0)
    reward = device_reward("third", lambda rollouts: rollouts.mask.sum(-1) / 3)
    scores, _ = combine({"third": (reward, 1)}).score({"third": {}}, rollouts)
    assert scores.outcome.dtype == scores.process.dtype == jnp.float32
    np.testing.assert_allclose(scores.outcome, rollouts.mask.sum(-1) / 3, rtol=1e-6)


def test_a_combination_combines_again_and_compiles():
    inner = combine({"a": (tokens_reward(), 0.5)})
    reward = combine({"inner": (inner, 2.0), "b": (tokens_reward(), 1.0)})
    scores, _ = jax.jit(reward.score)(reward.init(), random_rollouts(1))
    np.testing.assert_allclose(scores.outcome, 2 * scores.parts["b"])
    assert sorted(scores.parts) == ["b", "inner/a"]


def test_places_are_kept_apart():
    rewards = {"tokens": (tokens_reward(), 1.0), "letters": (letters_reward("a"), 2.0)}
    with pytest.raises(ValueError, match=r"one place.*split_places"):
        combine(rewards)
    device, host = split_places(rewards)
    assert (list(device), list(host)) == (["tokens"], ["letters"])
    assert combine(device).where == "device" and combine(host).where == "host"
    rollouts = spell(["q"], ["abca"])
    parts = []
    for members in (device, host):
        reward = combine(members)
        parts.append(reward.score(reward.init(), rollouts)[0])
    both = add_scores(*parts)
    np.testing.assert_array_equal(both.outcome, [5.0 + 2.0 * 2.0])
    assert sorted(both.parts) == ["letters", "tokens"]


def test_bad_combinations_are_errors():
    with pytest.raises(ValueError, match="none"):
        combine({})
    with pytest.raises(ValueError, match="'cloud'"):
        split_places({"a": (tokens_reward()._replace(where="cloud"), 1.0)})
    rollouts = random_rollouts(2)
    scores, _ = tokens_reward().score({}, rollouts)
    with pytest.raises(ValueError, match="tokens"):
        add_scores(scores, scores)


def test_a_batch_is_decoded_once_for_all_host_rewards():
    decoded = []

    def decode(ids):
        decoded.append(tuple(ids))
        return TOKENIZER.decode(ids)

    reward = combine({letter: (letters_reward(letter, decode), 1.0) for letter in "abc"})
    nested = combine({"both": (reward, 1.0), "d": (letters_reward("d", decode), 1.0)})
    rollouts = spell(["one", "two"], ["abc", "aab", "c", "d"], group=2)
    scores, _ = nested.score(nested.init(), rollouts)
    np.testing.assert_array_equal(scores.outcome, [3, 3, 1, 1])
    assert sorted(scores.parts) == ["both/a", "both/b", "both/c", "d"]
    assert len(decoded) == 4 + 2  # rows, and each prompt once for its group
    nested.score(nested.init(), rollouts)
    assert len(decoded) == 2 * (4 + 2)


def test_a_plain_function_on_the_host_combines_too():
    plain = tokens_reward()._replace(where="host")
    reward = combine({"plain": (plain, 1.0), "letters": (letters_reward("a"), 1.0)})
    scores, _ = reward.score(reward.init(), spell(["q"], ["aa"]))
    np.testing.assert_array_equal(scores.outcome, [3.0 + 2.0])


def online(name):
    """A reward whose state counts updates and remembers the noise it was given."""

    def update(state, rollouts, scores, key):
        number = state["number"] + 1
        noise = jax.random.uniform(key)
        metrics = {"number": Mean(total=number, count=jnp.float32(1))}
        return {"number": number, "noise": noise}, metrics

    return Reward(
        name=name,
        where="device",
        init=lambda: {"number": jnp.zeros(()), "noise": jnp.zeros(())},
        score=tokens_reward().score,
        update=update,
    )


def test_updates_reach_online_members_with_keys_of_their_own():
    reward = combine(
        {"a": (online("x"), 1.0), "fixed": (tokens_reward(), 1.0), "b": (online("x"), 1.0)}
    )
    rollouts = random_rollouts(3)
    state = reward.init()
    scores, state = reward.score(state, rollouts)
    state, metrics = reward.update(state, rollouts, scores, jax.random.key(0))
    assert state["fixed"] == {}
    assert {name: float(value(mean)) for name, mean in metrics.items()} == {
        "a/number": 1.0,
        "b/number": 1.0,
    }
    assert state["a"]["noise"] != state["b"]["noise"]
    assert combine({"fixed": (tokens_reward(), 1.0)}).update is None
