"""DAPO's overlong penalty, in literal numbers and against a loop over the published cases."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.rewards.overlong import overlong
from tests.rewards.examples import rollouts_of


def said(reward, lengths, width):
    """What the reward says of completions of these lengths."""
    rollouts = rollouts_of([[3]], [[4]] * len(lengths), group=len(lengths), width=width)
    mask = np.arange(width)[None] < np.array(lengths)[:, None]
    scores, _ = reward.score(reward.init(), dataclasses.replace(rollouts, mask=mask))
    np.testing.assert_array_equal(scores.process, np.zeros(mask.shape))
    return np.asarray(scores.outcome).tolist()


def test_the_numbers_of_the_paper():
    lengths = [1, 16_384, 18_432, 20_480]
    assert said(overlong(limit=20_480, buffer=4_096), lengths, 20_480) == [0.0, 0.0, -0.5, -1.0]


@pytest.mark.parametrize(("limit", "buffer"), [(8, 4), (8, 8), (5, 1)])
def test_against_the_three_cases(limit, buffer):
    lengths = list(range(12))  # a row without any token too
    wanted = []
    for tokens in lengths:
        if tokens <= limit - buffer:
            wanted.append(0.0)
        elif tokens <= limit:
            wanted.append((limit - buffer - tokens) / buffer)
        else:
            wanted.append(-1.0)
    assert said(overlong(limit=limit, buffer=buffer), lengths, 12) == pytest.approx(wanted)


@pytest.mark.parametrize(("limit", "buffer"), [(0, 1), (8, 0), (8, 9), (8, -1)])
def test_impossible_buffers_are_refused(limit, buffer):
    with pytest.raises(ValueError, match=f"limit={limit} and buffer={buffer}"):
        overlong(limit=limit, buffer=buffer)
