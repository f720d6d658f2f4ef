"""The price of a missing end, in literal numbers."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.rewards.missing_eos import missing_eos
from tests.rewards.examples import spell


@pytest.mark.parametrize("penalty", [-1.0, -0.25, -3])
def test_only_truncated_completions_pay(penalty):
    rollouts = spell(["q"], ["a", "bb", "a"], group=3)
    rollouts = dataclasses.replace(rollouts, truncated=np.array([False, True, True]))
    reward = missing_eos(penalty=penalty)
    scores, _ = reward.score(reward.init(), rollouts)
    np.testing.assert_array_equal(scores.outcome, [0.0, penalty, penalty])
    np.testing.assert_array_equal(scores.process, np.zeros(rollouts.mask.shape))


def test_the_usual_penalty_is_one():
    rollouts = dataclasses.replace(spell(["q"], ["a"]), truncated=np.array([True]))
    scores, _ = missing_eos().score({}, rollouts)
    np.testing.assert_array_equal(scores.outcome, [-1.0])


@pytest.mark.parametrize("penalty", [0.0, 1.0, float("nan")])
def test_a_penalty_that_pays_is_refused(penalty):
    with pytest.raises(ValueError, match=r"wanted a number below 0"):
        missing_eos(penalty=penalty)
