"""The price on length, in literal numbers."""

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
