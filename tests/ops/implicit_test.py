"""Implicit rewards of tokens and steps, against loops; padding holds NaN."""

import numpy as np

from rlhf_jax.ops.implicit import step_rewards, token_rewards

LENGTHS = (5, 3, 1, 0, 4)
WIDTH = 5


def batch(seed=0):
    """log π, log π_ref, the mask and step ends; every completion's last token ends a step."""
    rng = np.random.default_rng(seed)
    mask = np.arange(WIDTH) < np.array(LENGTHS)[:, None]
    last = np.arange(WIDTH) == np.array(LENGTHS)[:, None] - 1
    ends = mask & ((rng.random(mask.shape) < 0.4) | last)
    ours, theirs = (np.where(mask, -rng.random(mask.shape), np.nan) for _ in range(2))
    return ours.astype(np.float32), theirs.astype(np.float32), mask, ends


def test_the_sum_of_a_completion_is_the_log_ratio_of_the_whole():
    """Σ_t r_t = β (log π_ψ(y) − log π_ref(y))."""
    ours, theirs, mask, _ = batch()
    rewards = np.asarray(token_rewards(ours, theirs, mask, beta=0.05))
    for i, length in enumerate(LENGTHS):
        whole = 0.05 * (ours[i, :length].sum() - theirs[i, :length].sum())
        np.testing.assert_allclose(rewards[i].sum(), whole, atol=1e-7)
    np.testing.assert_array_equal(rewards[~mask], 0)


def test_steps_against_loops():
    ours, theirs, mask, ends = batch(1)
    rewards = token_rewards(ours, theirs, mask, beta=2.0)
    steps = np.asarray(step_rewards(rewards, ends))
    wanted = np.zeros(mask.shape)
    for i in range(len(LENGTHS)):
        step = 0.0
        for t, reward in enumerate(np.asarray(rewards)[i]):
            step += reward
            if ends[i, t]:
                wanted[i, t], step = step, 0.0
    np.testing.assert_allclose(steps, wanted, atol=1e-6)
    np.testing.assert_allclose(steps.sum(1), np.asarray(rewards).sum(1), atol=1e-6)
