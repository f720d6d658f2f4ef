"""aggregate_steps, normalise, clip, shrink: literal numbers, their order, frozen statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards.base import (
    aggregate_steps,
    clip,
    combine,
    device_reward,
    host_reward,
    normalise,
    shrink,
)
from rlhf_jax.types import Reward, Scores
from tests.rewards.examples import TOKENIZER, random_rollouts, spell


def given(outcome, process=None):
    """A reward that reads its outcome from `version` and says a fixed process score."""

    def score(state, rollouts):
        said = jnp.asarray(outcome, jnp.float32)
        steps = jnp.zeros(rollouts.mask.shape) if process is None else jnp.asarray(process)
        return Scores(outcome=said, process=steps, parts={"given": said}), state

    return Reward(name="given", where="device", init=dict, score=score)


def lengths():
    return device_reward("lengths", lambda rollouts: rollouts.mask.sum(-1))


def scored(reward, rollouts, state=None):
    return reward.score(reward.init() if state is None else state, rollouts)[0]


FOUR = spell(["q"], ["a", "bb", "ccc", "dddd"], group=4)


def test_normalise_before_calibration_changes_nothing():
    plain, wrapped = scored(lengths(), FOUR), scored(normalise(lengths()), FOUR)
    np.testing.assert_array_equal(plain.outcome, wrapped.outcome)


def test_normalise_uses_the_reference_batch_and_freezes_it():
    reward = normalise(lengths())
    state = reward.calibrate(reward.init(), FOUR)  # lengths 2, 3, 4, 5
    np.testing.assert_allclose(state["mean"], 3.5)
    np.testing.assert_allclose(state["std"], np.sqrt(1.25), rtol=1e-6)
    other = spell(["q"], ["aaaaaaaaa"])
    scores, after = reward.score(state, other)
    np.testing.assert_allclose(scores.outcome, [(10 - 3.5) / np.sqrt(1.25)], rtol=1e-6)
    np.testing.assert_array_equal(scores.parts["lengths"], [10.0])
    jax.tree.map(np.testing.assert_array_equal, state, after)


def test_process_is_scaled_by_the_spread_of_its_sums_and_not_centred():
    process = np.zeros((4, 5), np.float32)
    process[:, 0] = [0.0, 2.0, 4.0, 6.0]
    process[:, 1] = 1.0  # sums 1, 3, 5, 7: population standard deviation sqrt(5)
    reward = normalise(given([0.0] * 4, process))
    state = reward.calibrate(reward.init(), FOUR)
    scores = scored(reward, FOUR, state)
    np.testing.assert_allclose(scores.process, process / np.sqrt(5), rtol=1e-6)
    np.testing.assert_array_equal(scores.outcome, np.zeros(4))


def test_a_constant_score_is_centred_and_not_blown_up():
    reward = normalise(given([7.0] * 4))
    state = reward.calibrate(reward.init(), FOUR)
    np.testing.assert_array_equal(scored(reward, FOUR, state).outcome, np.zeros(4))


def test_clip_and_shrink_literal():
    said = [-5.0, -1.0, 0.0, 2.0]
    np.testing.assert_array_equal(scored(clip(given(said), 1.5), FOUR).outcome, [-1.5, -1, 0, 1.5])
    np.testing.assert_array_equal(
        scored(shrink(given(said), negative=0.5), FOUR).outcome, [-2.5, -0.5, 0, 2]
    )
    np.testing.assert_array_equal(
        scored(shrink(given(said), negative=0.25, positive=0.5), FOUR).outcome,
        [-1.25, -0.25, 0, 1],
    )


def test_order_normalise_clip_shrink():
    said = np.asarray([-30.0, 1.0, 2.0, 3.0], np.float32)
    reward = shrink(clip(normalise(given(said)), 1.0), negative=0.2)
    state = reward.calibrate(reward.init(), FOUR)
    z = (said - said.mean()) / said.std()
    wanted = np.clip(z, -1, 1)
    wanted = np.where(wanted < 0, 0.2 * wanted, wanted)
    scores = scored(reward, FOUR, state)
    np.testing.assert_allclose(scores.outcome, wanted, rtol=1e-5)
    np.testing.assert_array_equal(scores.parts["given"], said)


def test_clip_and_shrink_leave_process_alone_so_that_it_telescopes():
    wave = np.tile(np.asarray([0.9, -0.9, 0.9, -0.9, 0.0], np.float32), (4, 1))
    reward = shrink(clip(given([0.0] * 4, wave), 0.1), negative=0.1)
    np.testing.assert_array_equal(scored(reward, FOUR).process, wave)


def test_bad_values_are_errors():
    with pytest.raises(ValueError, match="limit=0"):
        clip(lengths(), 0)
    with pytest.raises(ValueError, match="negative=2"):
        shrink(lengths(), negative=2.0)
    with pytest.raises(ValueError, match="negative=0"):
        shrink(lengths(), negative=0.0)


def test_calibration_goes_through_combine_and_other_members_keep_their_state():
    reward = combine({"z": (normalise(lengths()), 1.0), "raw": (lengths(), 1.0)})
    state = jax.jit(reward.calibrate)(reward.init(), FOUR)
    np.testing.assert_allclose(state["z"]["mean"], 3.5)
    assert state["raw"] == {}
    scores = scored(reward, FOUR, state)
    raw = np.asarray([2, 3, 4, 5])
    np.testing.assert_allclose(scores.outcome, raw + (raw - 3.5) / np.sqrt(1.25), rtol=1e-6)


def test_a_host_reward_is_reshaped_as_well_and_still_decoded_once():
    decoded = []

    def decode(ids):
        decoded.append(1)
        return TOKENIZER.decode(ids)

    def size(prompt, completion, record):
        return len(completion)

    def made():
        return host_reward("size", size, decode=decode, records=lambda source, record: {})

    one = clip(normalise(made()), 0.5)
    assert one.where == "host"
    reward = combine({"one": (one, 1.0), "two": (made(), 0.0)})
    state = reward.calibrate(reward.init(), FOUR)
    np.testing.assert_allclose(state["one"]["mean"], 2.5)
    decoded.clear()
    scores = scored(reward, FOUR, state)
    assert len(decoded) == 5
    wanted = np.asarray([-0.5, -0.5 / np.sqrt(1.25), 0.5 / np.sqrt(1.25), 0.5])
    np.testing.assert_allclose(scores.outcome, wanted, rtol=1e-6)


def test_normalise_is_compiled_once_over_changing_statistics():
    reward = normalise(lengths())
    score = jax.jit(reward.score)
    state = reward.init()
    score(state, random_rollouts(0))
    state = reward.calibrate(state, random_rollouts(1))
    score(state, random_rollouts(2))
    assert score._cache_size() == 1


def steps_of(process, ends):
    """A reward that says these process scores, and rollouts of one prompt with these ends."""
    rollouts = spell(["q"], ["abcd"] * len(process), group=len(process), step_ends=np.array(ends))
    return given([0.0] * len(process), np.array(process, np.float32)), rollouts


def test_steps_become_one_outcome_and_leave_no_process_score():
    logits = [[2.0, 0.0, -1.0, 7.0, 7.0], [0.0, 0.0, 3.0, 0.0, 7.0]]
    ends = [[True, False, True, False, False], [False, False, True, False, False]]
    reward, rollouts = steps_of(logits, ends)
    odds = np.exp([2.0, -1.0, 3.0])
    first, second, alone = odds / (1 + odds)
    wanted = dict(
        min=(second, alone),
        product=(first * second, alone),
        mean=((first + second) / 2, alone),
        last=(second, alone),
        sum=(1.0, 3.0),
    )
    for how, outcome in wanted.items():
        scores = scored(aggregate_steps(reward, how), rollouts)
        np.testing.assert_allclose(scores.outcome, outcome, rtol=1e-6, err_msg=how)
        np.testing.assert_array_equal(scores.process, np.zeros((2, 5)))
        np.testing.assert_array_equal(
            scores.parts["given"], scored(reward, rollouts).parts["given"]
        )


def test_aggregated_steps_rank_by_the_weakest_step_as_normalised_outcomes():
    reward, rollouts = steps_of(
        [[5.0, 5.0, 0, 0, 0], [9.0, -9.0, 0, 0, 0]], [[True] * 2 + [False] * 3] * 2
    )
    wrapped = normalise(aggregate_steps(reward, "min"))
    state = wrapped.calibrate(wrapped.init(), rollouts)
    np.testing.assert_allclose(scored(wrapped, rollouts, state).outcome, [1.0, -1.0], rtol=1e-5)


def test_steps_outside_of_a_completion_are_not_aggregated():
    reward, rollouts = steps_of([[4.0, 0, 0, 0, -4.0]], [[True, False, False, False, True]])
    cut = type(rollouts)(**{**vars(rollouts), "mask": np.array([[True] * 4 + [False]])})
    np.testing.assert_allclose(scored(aggregate_steps(reward, "sum"), cut).outcome, [4.0])


def test_an_unknown_way_to_aggregate_is_an_error():
    with pytest.raises(ValueError, match=r"'best'.*min, product, mean, last, sum"):
        aggregate_steps(lengths(), "best")
