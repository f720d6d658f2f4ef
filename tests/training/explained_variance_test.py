"""What the critic knew of the returns before the update."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.training.update import explained_variance
from rlhf_jax.types import Targets
from tests.algorithms import loops


def share(returns, values):
    """Of three tokens that train; NaN stands wherever nothing does."""
    experience, _ = loops.batch()
    mask = np.zeros(experience.rollouts.mask.shape, bool)
    mask.reshape(-1)[:3] = True
    targets, guesses = np.full((2, *mask.shape), np.nan, np.float32)
    targets[mask], guesses[mask] = returns, values
    targets = Targets(advantages=targets, returns=targets, mask=mask)
    found = explained_variance(dataclasses.replace(experience, values=guesses), targets)
    assert float(found.count) == 1
    return float(found.total)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([1, 2, 3], 1.0), ([5, 5, 5], 0.0), ([0, 2, 4], 0.0), ([3, 2, 1], -3.0), ([0, 1, 2], 1.0)],
)
def test_by_hand(values, wanted):
    """Returns 1, 2, 3 vary by 2/3; a critic that is off by a constant knows their variance."""
    assert share([1, 2, 3], values) == pytest.approx(wanted, abs=1e-6)


def test_equal_returns_leave_nothing_to_explain():
    assert share([2, 2, 2], [0, 1, 5]) == 0
