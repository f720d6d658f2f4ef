"""The rewards of length, in literal numbers."""

import numpy as np
import pytest

from rlhf_jax.rewards.length import length
from tests.rewards.examples import spell


def test_tokens_beyond_the_free_ones_cost():
    rollouts = spell(["q"], ["a", "bbb", "ccccccc"], group=3)  # 2, 4, 8 tokens with the end
    reward = length(per_token=-0.25, free=3)
    scores, _ = reward.score(reward.init(), rollouts)
    np.testing.assert_array_equal(scores.outcome, [0.0, -0.25, -1.25])
    np.testing.assert_array_equal(scores.process, np.zeros(rollouts.mask.shape))


def test_a_negative_allowance_is_an_error():
    with pytest.raises(ValueError, match="free=-1"):
        length(per_token=-0.1, free=-1)


def test_a_target_is_worth_one_and_half_or_twice_of_it_less():
    # LPPO, R = 1 - |len / L - 1|: 1 at L, 1/2 at L/2, 0 at 2L; with L = 4, the end counts.
    rollouts = spell(["q"], ["aaa", "a", "a" * 7, "a" * 11], group=4)
    reward = length(target=4)
    scores, _ = reward.score(reward.init(), rollouts)
    np.testing.assert_array_equal(scores.outcome, [1.0, 0.5, 0.0, -1.0])
    for published in (156, 250, 120):
        long = spell(["q"], ["a" * (n - 1) for n in (published, published // 2, 2 * published)],
                     group=3)  # fmt: skip
        scores, _ = length(target=published).score((), long)
        np.testing.assert_allclose(scores.outcome, [1.0, 0.5, 0.0], atol=1e-6)


def test_a_target_stands_alone():
    with pytest.raises(ValueError, match="target=9 beside per_token=None and free=2"):
        length(target=9, free=2)
    with pytest.raises(ValueError, match="target=0, wanted 1 or more tokens"):
        length(target=0)
