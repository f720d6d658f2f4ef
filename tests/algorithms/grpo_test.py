"""GRPO against a Python loop, its relatives, and groups without signal."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.types import CompletionOutput, Experience, Prompts, Rollouts, Scores

LENGTHS = (3, 1, 2, 4, 4, 2)
GROUP = 3


def batch(outcome=(1.0, 0.25, -0.5, 0.3, 0.3, 2.0), seed=0):
    """Six rows in groups of three, NaN in padding."""
    rng = np.random.default_rng(seed)
    mask = np.arange(4)[None, :] < np.array(LENGTHS)[:, None]

    def floats(scale=1.0):
        x = np.where(mask, scale * rng.normal(size=mask.shape), np.nan)
        return jnp.asarray(x, jnp.float32)

    zeros, rows = jnp.zeros(2, jnp.int32), len(LENGTHS)
    prompts = Prompts(
        tokens=zeros[:, None], mask=jnp.ones((2, 1), bool), record=zeros, source=zeros, draw=zeros
    )
    rollouts = Rollouts(
        prompts=prompts,
        tokens=jnp.zeros(mask.shape, jnp.int32),
        mask=jnp.asarray(mask),
        step_ends=jnp.zeros(mask.shape, bool),
        logprobs=floats(),
        behaviour_logprobs=floats(),
        truncated=jnp.zeros(rows, bool),
        sample=jnp.arange(rows) % GROUP,
        version=jnp.zeros(rows, jnp.int32),
    )
    experience = Experience(
        rollouts=rollouts,
        scores=Scores(outcome=jnp.asarray(outcome, jnp.float32), process=0.0 * floats(), parts={}),
        logprobs=floats(),
        ref_logprobs=floats(),
        values=jnp.zeros(mask.shape),
        extra={},
    )
    output = CompletionOutput(
        logprobs=experience.logprobs + floats(0.6), entropy=jnp.abs(floats()), scores={}
    )
    return experience, output


def run(algorithm, experience, output):
    targets, _ = algorithm.targets(experience, GROUP, algorithm.init())
    terms, metrics = algorithm.loss(output, experience, targets, GROUP)
    return targets, terms, metrics


def test_against_a_loop():
    experience, output = batch()
    targets, terms, _ = run(grpo(kl_coef=0.04), experience, output)
    policy = kl = 0.0
    for i, n in enumerate(LENGTHS):
        first = i - i % GROUP
        group = [float(r) for r in experience.scores.outcome[first : first + GROUP]]
        spread = statistics.pstdev(group) + 1e-6
        advantage = (float(experience.scores.outcome[i]) - statistics.fmean(group)) / spread
        for t in range(n):
            assert float(targets.advantages[i, t]) == pytest.approx(advantage, rel=1e-5)
            new = float(output.logprobs[i, t])
            ratio = math.exp(new - float(experience.logprobs[i, t]))
            held = min(max(ratio, 0.8), 1.28)
            policy -= min(ratio * advantage, held * advantage) / n
            delta = new - float(experience.ref_logprobs[i, t])
            kl += (math.exp(-delta) - 1 + delta) / n
    assert float(terms["policy"].mean.total) == pytest.approx(policy, rel=1e-5)
    assert float(terms["kl"].mean.total) == pytest.approx(kl, rel=1e-5)
    assert float(terms["kl"].weight) == pytest.approx(0.04)
    assert float(terms["policy"].mean.count) == float(terms["kl"].mean.count) == len(LENGTHS)


@pytest.mark.parametrize("score", [0.0, 0.1, -7.3])
def test_equal_rewards_give_no_advantage_and_no_gradient(score):
    experience, output = batch(outcome=(score,) * 6)
    algorithm = grpo(kl_coef=0.0)
    targets, terms, _ = run(algorithm, experience, output)
    np.testing.assert_array_equal(targets.advantages, 0)
    assert list(terms) == ["policy"]

    def total(logprobs):
        moved = CompletionOutput(logprobs=logprobs, entropy=output.entropy, scores={})
        return algorithm.loss(moved, experience, targets, GROUP)[0]["policy"].mean.total

    np.testing.assert_array_equal(jax.grad(total)(output.logprobs), 0)


def test_without_scaling_advantages_are_centred_rewards():
    experience, output = batch()
    targets, _, _ = run(grpo(scale="none"), experience, output)
    rewards = np.asarray(experience.scores.outcome).reshape(2, GROUP)
    centred = (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1)
    np.testing.assert_allclose(targets.advantages[:, 0], centred, rtol=1e-5, atol=1e-6)
    # The spread of a group matters only here: 100 times the spread, 100 times the advantage.
    wide, _, _ = run(grpo(scale="none"), batch(100 * experience.scores.outcome)[0], output)
    np.testing.assert_allclose(wide.advantages, 100 * targets.advantages, rtol=1e-4, atol=1e-5)


def test_process_scores_count_as_reward():
    experience, output = batch()
    process = jnp.where(experience.rollouts.mask, 0.5, jnp.nan)
    scores = Scores(outcome=experience.scores.outcome, process=process, parts={})
    moved = Experience(**{**vars(experience), "scores": scores})
    targets, _, _ = run(grpo(), moved, output)
    wanted = np.asarray(experience.scores.outcome) + 0.5 * np.array(LENGTHS)
    np.testing.assert_allclose(targets.returns[:, 0], wanted, rtol=1e-6)


def test_a_longer_wrong_answer_leaves_the_others_alone_with_a_constant():
    """Dr. GRPO: sums over a constant. The loss of row 0 does not know the length of row 1."""
    algorithm = grpo(
        scale="none", kl_coef=0.0, aggregate="sequence_mean_token_sum_norm", constant=4.0
    )
    experience, output = batch()
    targets, terms, _ = run(algorithm, experience, output)
    by_hand = 0.0
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            advantage = float(targets.advantages[i, t])
            ratio = math.exp(float(output.logprobs[i, t]) - float(experience.logprobs[i, t]))
            by_hand -= min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage) / 4.0
    assert float(terms["policy"].mean.total) == pytest.approx(by_hand, rel=1e-5)
    assert float(terms["policy"].mean.count) == len(LENGTHS)


def test_needs_and_refusals():
    assert grpo().needs.reference and not grpo().needs.value and grpo().needs.min_group == 2
    assert not grpo(kl_coef=0.0).needs.reference
    with pytest.raises(ValueError, match="unknown scale 'mad'; known: std, none"):
        grpo(scale="mad")
    with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
        grpo(aggregate="mean")
    with pytest.raises(ValueError, match="needs a constant above 0"):
        grpo(aggregate="sequence_mean_token_sum_norm")
