"""Online DPO against a loop: the best and the worst of each group are a pair."""

import dataclasses
import math

import numpy as np
import pytest

from rlhf_jax.algorithms.online_dpo import online_dpo
from tests.algorithms import loops
from tests.algorithms.loops import GROUP, Wanted, batch, ours


def pairs_of(rows):
    """(best, worst) of each group, the first of equal ones; none where all rewards are equal."""
    pairs = []
    for first in range(0, len(rows), GROUP):
        rewards = {i: rows[i].reward for i in range(first, first + GROUP)}
        best, worst = max(rewards, key=rewards.get), min(rewards, key=rewards.get)
        if rewards[best] > rewards[worst]:
            pairs.append((best, worst))
    return pairs


def dpo_loop(experience, beta):
    """−mean over pairs of log σ(β [log π/π_ref (y+) − log π/π_ref (y−)])."""
    rows = loops.rows_of(experience)
    pairs = pairs_of(rows)
    signs = [0.0] * len(rows)
    for best, worst in pairs:
        signs[best], signs[worst] = 1.0, -1.0

    def gain(point, i):
        return sum(point["logprobs"][i]) - sum(rows[i].ref)

    def terms(point, still):
        margins = [beta * (gain(point, b) - gain(point, w)) for b, w in pairs]
        losses = [math.log(1 + math.exp(-margin)) for margin in margins]
        return {"dpo": (1.0, sum(losses) / max(len(losses), 1))}

    returns = loops.everywhere([row.reward for row in rows], rows)
    kept = [sign != 0 for sign in signs]
    return pairs, Wanted(loops.everywhere(signs, rows), returns, terms, kept=kept)


@pytest.mark.parametrize("beta", [0.1, 2])
def test_against_a_loop(beta):
    data = batch()
    pairs, wanted = dpo_loop(data[0], beta)
    assert len(pairs) == 2  # the last group's rewards are all equal
    found = loops.assert_agrees("online_dpo", data, wanted, beta=beta)
    assert float(found.terms["dpo"].mean.count) == 2
    assert not np.asarray(found.gradient.logprobs)[-GROUP:].any()
    margin = found.metrics["dpo/margin"]
    losses = wanted.terms(*[loops.point_of(data[1], data[0].rollouts.mask)] * 2)["dpo"][1]
    assert (float(margin.count), float(found.metrics["dpo/accuracy"].count)) == (2.0, 2.0)
    assert losses > 0


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_half_beta():
    outcome = [1.0, 0.0, 0.5, 0.5] * 3
    experience, output = batch(outcome=outcome, lengths=(2,) * 12, process=0.0)
    there = dataclasses.replace(output, logprobs=experience.ref_logprobs)
    found = ours("online_dpo", (experience, there), beta=0.1)
    assert loops.means(found)["dpo"][1] == pytest.approx(math.log(2))
    slope = 0.1 / 2 / 3  # β σ(0), of three pairs
    gradient = np.asarray(found.gradient.logprobs)[:, :2]
    wanted = np.array([-slope, slope, 0.0, 0.0] * 3)[:, None]
    np.testing.assert_allclose(gradient, np.broadcast_to(wanted, gradient.shape), rtol=1e-5)
    assert float(found.metrics["dpo/accuracy"].total) == 0  # a tie is not a win


def test_only_the_order_counts():
    outcome = np.random.default_rng(5).normal(size=12)
    plain, stretched = (batch(outcome=x, process=0.0) for x in (outcome, 100 * outcome + 7))
    a, b = ours("online_dpo", plain), ours("online_dpo", stretched)
    np.testing.assert_array_equal(a.gradient.logprobs, b.gradient.logprobs)


def test_an_empty_side_is_a_side_without_log_probability():
    """Row 2 is empty and the worst of its group: its log-ratio is 0."""
    outcome = np.array([1.0, 0.5, -1.0, 0.2] * 3)
    data = batch(outcome=outcome, process=0.0)
    pairs, wanted = dpo_loop(data[0], 0.1)
    assert pairs[0] == (0, 2)
    loops.assert_agrees("online_dpo", data, wanted)


@pytest.mark.parametrize("score", [0.0, 0.1, -7.3])
def test_equal_rewards_make_no_pair(score):
    found = ours("online_dpo", batch(outcome=score, process=0.0))
    np.testing.assert_array_equal(found.targets.advantages, 0)
    np.testing.assert_array_equal(found.gradient.logprobs, 0)
    assert not np.asarray(found.targets.mask).any()
    assert (float(found.terms["dpo"].mean.total), float(found.terms["dpo"].mean.count)) == (0, 0)
    assert all(np.isfinite(float(mean.total)) for mean in found.metrics.values())


def test_needs_and_refusals():
    assert online_dpo().needs.reference and not online_dpo().needs.value
    for beta in (0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"beta={beta}; wanted a number above 0"):
            online_dpo(beta=beta)
