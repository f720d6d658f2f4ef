"""Dynamic sampling's refill against a loop over groups."""

import jax
import numpy as np
import pytest

from rlhf_jax.training.selection import draw_metrics, refill
from rlhf_jax.types import Scores
from tests.rewards.examples import random_rollouts

N, K, T = 4, 2, 9


def batch(seed):
    """Rollouts with scores that tell where each row comes from."""
    rollouts = random_rollouts(seed, prompts=N, group=K, width=T)
    outcome = 100.0 * seed + np.arange(N * K, dtype=np.float32)
    process = np.broadcast_to(outcome[:, None], (N * K, T)).copy()
    return rollouts, Scores(outcome=outcome, process=process, parts={"a": -outcome})


def by_loop(kept, kept_signal, fresh, fresh_signal):
    """(batch, group) of the first N groups: with signal in the order of drawing, then without."""
    drawn = [(kept, i, kept_signal[i]) for i in range(N)]
    drawn += [(fresh, i, fresh_signal[i]) for i in range(N)]
    chosen = [group for group in drawn if group[2]] + [group for group in drawn if not group[2]]
    return chosen[:N]


@pytest.mark.parametrize(
    ("kept_signal", "fresh_signal"),
    [
        ([True] * N, [True] * N),  # nothing to refill: the kept batch stays
        ([False] * N, [True] * N),
        ([False] * N, [False] * N),  # no signal anywhere: the first draw stays
        ([True, False, False, True], [False, True, False, False]),
        ([False, True, False, False], [True, False, True, True]),
    ],
)
def test_groups_with_signal_come_first_and_whole(kept_signal, fresh_signal):
    kept, fresh = batch(1), batch(2)
    got, signal = jax.jit(refill)(kept, np.array(kept_signal), fresh, np.array(fresh_signal))
    wanted = by_loop(kept, kept_signal, fresh, fresh_signal)
    np.testing.assert_array_equal(signal, [group[2] for group in wanted])
    rollouts, scores = got
    for n, ((old_rollouts, old_scores), i, _) in enumerate(wanted):
        for name, leaf in vars(rollouts.prompts).items():
            np.testing.assert_array_equal(leaf[n], vars(old_rollouts.prompts)[name][i])
        old, new = slice(i * K, i * K + K), slice(n * K, n * K + K)
        for name in ("tokens", "mask", "step_ends", "sample", "truncated"):
            np.testing.assert_array_equal(
                vars(rollouts)[name][new], vars(old_rollouts)[name][old], err_msg=name
            )
        np.testing.assert_array_equal(scores.outcome[new], old_scores.outcome[old])
        np.testing.assert_array_equal(scores.process[new], old_scores.process[old])
        np.testing.assert_array_equal(scores.parts["a"][new], old_scores.parts["a"][old])


def test_shapes_and_types_do_not_change():
    kept, fresh = batch(1), batch(2)
    got, _ = refill(kept, np.zeros(N, bool), fresh, np.ones(N, bool))
    for new, old in zip(jax.tree.leaves(got), jax.tree.leaves(kept), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def test_draws_and_what_they_left_short_are_counted():
    found = draw_metrics(np.array([True, False, True, False, False]), 3)
    numbers = {name: (float(m.total), float(m.count)) for name, m in found.items()}
    assert numbers == {"rollout/draws": (3.0, 1.0), "rollout/shortfall": (3.0, 1.0)}
