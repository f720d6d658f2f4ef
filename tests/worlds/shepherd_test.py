"""Labels from continuations where the truth is known: a chain of steps that go wrong or are mended.

The world of Math-Shepherd (Wang et al. 2023, https://arxiv.org/abs/2312.08935). A prefix is right
or wrong. Each step of a solution spoils a right prefix with probability 0.15 and mends a wrong one
with probability 0.03; a policy that continues it spoils with a probability of its own. Hard labels
are best at a middling N, because a wrong prefix is mended sooner or later, and soft ones gain with
every N, as the paper reports.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

from rlhf_jax.ops.preference import step_cross_entropy
from rlhf_jax.ops.step_labels import hard_labels, soft_labels

STEPS, SOLUTIONS = 6, 4_000
ERROR, REPAIR = 0.15, 0.03
COUNTS = (1, 2, 4, 8, 16, 32)  # N
LEAST = 0.02  # a share of 0 or 1 is read as this far from certain
ORDINARY, WEAK = 0.15, 0.35  # how often the policy that continues spoils a step


def walk(right, steps, error, rng):
    """Prefixes after so many more steps."""
    for _ in range(steps):
        spoilt, mended = rng.random(right.shape) < error, rng.random(right.shape) < REPAIR
        right = np.where(right, ~spoilt, mended)
    return right


@functools.cache
def world(error: float):
    """Whether the prefix of each step is right [4000 6], and 32 continuations of it [4000 6 32]."""
    rng = np.random.default_rng(0)
    prefix, truth, outcomes = np.ones(SOLUTIONS, bool), [], []
    for step in range(STEPS):
        prefix = walk(prefix, 1, ERROR, rng)
        truth.append(prefix)
        copies = np.repeat(prefix[:, None], max(COUNTS), axis=1)
        outcomes.append(walk(copies, STEPS - 1 - step, error, rng))
    return np.stack(truth, 1), np.stack(outcomes, 1)


@functools.cache
def hard_accuracy(error: float) -> list[float]:
    """The share of hard labels that are true, for each N."""
    truth, outcomes = world(error)
    return [float(jnp.mean(hard_labels(outcomes[..., :n]) == truth)) for n in COUNTS]


def soft_cross_entropy(error: float) -> list[float]:
    """What the soft labels say of the truth, in nats per step, for each N."""
    truth, outcomes = world(error)
    found, ends = [], np.ones(truth.shape, bool)
    for n in COUNTS:
        share = jnp.clip(soft_labels(outcomes[..., :n]), LEAST, 1 - LEAST)
        logits = jnp.log(share) - jnp.log1p(-share)
        loss = step_cross_entropy(logits, truth.astype(np.float32), ends)
        found.append(float(jnp.mean(loss)))
    return found


def best(accuracies: list[float]) -> int:
    return COUNTS[int(np.argmax(accuracies))]


def test_hard_labels_are_best_at_a_middling_count():
    accuracies = hard_accuracy(ORDINARY)
    assert COUNTS[0] < best(accuracies) < COUNTS[-1], accuracies
    # So far from the ends of the sweep that no noise of 24,000 labels (0.003) moves the peak there.
    assert max(accuracies) > max(accuracies[0], accuracies[-1]) + 0.05, accuracies


def test_a_weaker_policy_needs_more_continuations():
    ordinary, weak = hard_accuracy(ORDINARY), hard_accuracy(WEAK)
    assert best(ordinary) < best(weak) < COUNTS[-1], (ordinary, weak)
    assert max(weak) < max(ordinary), (ordinary, weak)


def test_soft_labels_gain_with_every_count():
    for error in (ORDINARY, WEAK):
        losses = soft_cross_entropy(error)
        rises = [after - before for before, after in itertools.pairwise(losses)]
        assert max(rises) < 1e-2, losses
        assert losses[-1] < losses[0] - 0.1, losses
