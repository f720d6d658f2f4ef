"""Rehearsal around an algorithm: one more term, and nothing else of it changes."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.algorithms.auxiliary import rehearsed
from rlhf_jax.find import find, members
from rlhf_jax.types import Texts
from tests.conformance.algorithms_test import GROUP, make_batch

SHELF = members("algorithms")


def with_rows(experience, output):
    """Two rows of three trained tokens in all; other columns hold NaN."""
    loss_mask = np.array([[False, True, True, False], [False, False, True, False]])
    logprobs = np.full(loss_mask.shape, np.nan, np.float32)
    logprobs[loss_mask] = [-1.0, -2.0, -6.0]
    ids = np.zeros(loss_mask.shape, np.int32)
    rows = Texts(tokens=ids, mask=loss_mask, loss_mask=loss_mask, segment=ids)
    extra = {"rehearsal": rows}
    return (
        dataclasses.replace(experience, extra=extra),
        dataclasses.replace(output, extra={"rehearsal": logprobs}),
    )


@pytest.mark.parametrize("name", SHELF)
def test_any_algorithm_takes_it_and_keeps_its_own_terms(name):
    algorithm = find("algorithms", name)()
    experience, output = make_batch(algorithm, padding=np.nan)
    wrapped = rehearsed(algorithm, weight=0.25)
    assert wrapped.needs == algorithm.needs._replace(extra=("rehearsal",))
    targets, _ = algorithm.targets(experience, GROUP, algorithm.init())
    before, _ = algorithm.loss(output, experience, targets, GROUP)
    experience, output = with_rows(experience, output)
    own, _ = wrapped.targets(experience, GROUP, wrapped.init())
    jax.tree.map(np.testing.assert_array_equal, targets, own)
    after, _ = wrapped.loss(output, experience, own, GROUP)
    added = after.pop("rehearsal")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert added.weight == 0.25
    assert (float(added.mean.total), float(added.mean.count)) == (9.0, 3.0)


def test_a_weight_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="weight=0; wanted a number above 0"):
        rehearsed(find("algorithms", "grpo")(), weight=0)
