"""PPO end to end against a Python loop over one small batch, and its reductions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.types import CompletionOutput, Experience, Prompts, Rollouts, Scores

LENGTHS = (3, 1, 2, 4)


def batch(seed=0):
    """Rows of 3, 1, 2 and 4 valid tokens, groups of 2, NaN in padding."""
    rng = np.random.default_rng(seed)
    mask = np.arange(4)[None, :] < np.array(LENGTHS)[:, None]

    def floats(scale=1.0):
        x = np.where(mask, scale * rng.normal(size=mask.shape), np.nan)
        return jnp.asarray(x, jnp.float32)

    zeros = jnp.zeros(2, jnp.int32)
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
        truncated=jnp.zeros(4, bool),
        sample=jnp.arange(4) % 2,
        version=jnp.zeros(4, jnp.int32),
    )
    experience = Experience(
        rollouts=rollouts,
        scores=Scores(outcome=jnp.array([0.7, -0.25, 1.5, 0.1]), process=floats(0.3), parts={}),
        logprobs=floats(),
        ref_logprobs=floats(),
        values=floats(),
        extra={},
    )
    # Ratios on both sides of every clip.
    output = CompletionOutput(
        logprobs=experience.logprobs + floats(0.6),
        entropy=jnp.abs(floats()),
        scores={"value": experience.values + floats(0.4)},
    )
    return experience, output


def loop_ppo(experience, output, *, gamma, lam, beta, clip, value_clip, dual):
    """Every token in turn, in float64, as PPO is written down."""
    tokens = [(i, t) for i, n in enumerate(LENGTHS) for t in range(n)]

    def at(x, i, t):
        return float(x[i, t])

    advantage, target = {}, {}
    for i, n in enumerate(LENGTHS):
        following_value = following_advantage = 0.0
        for t in reversed(range(n)):
            reward = at(experience.scores.process, i, t) - beta * (
                at(experience.logprobs, i, t) - at(experience.ref_logprobs, i, t)
            )
            if t == n - 1:
                reward += float(experience.scores.outcome[i])
            value = at(experience.values, i, t)
            error = reward + gamma * following_value - value
            following_advantage = error + gamma * lam * following_advantage
            following_value = value
            advantage[i, t], target[i, t] = following_advantage, following_advantage + value
    mean = sum(advantage.values()) / len(tokens)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantage.values()) / len(tokens))
    policy = value_loss = 0.0
    for i, t in tokens:
        a = (advantage[i, t] - mean) / deviation
        ratio = math.exp(at(output.logprobs, i, t) - at(experience.logprobs, i, t))
        objective = min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
        policy -= max(objective, dual * a) if a < 0 else objective
        new, old = at(output.scores["value"], i, t), at(experience.values, i, t)
        near = min(max(new, old - value_clip), old + value_clip)
        value_loss += 0.5 * max((new - target[i, t]) ** 2, (near - target[i, t]) ** 2)
    return policy, value_loss


def test_against_a_loop():
    experience, output = batch()
    algorithm = ppo(gamma=0.97, lam=0.9, kl_coef=0.2, value_coef=0.5, entropy_coef=0.01)
    targets, state = algorithm.targets(experience, 2, algorithm.init())
    terms, metrics = algorithm.loss(output, experience, targets, 2)
    policy, value = loop_ppo(
        experience, output, gamma=0.97, lam=0.9, beta=0.2, clip=0.2, value_clip=0.2, dual=3.0
    )
    assert state == ()
    assert float(terms["policy"].mean.total) == pytest.approx(policy, rel=1e-5)
    assert float(terms["value"].mean.total) == pytest.approx(value, rel=1e-5)
    weights = {name: float(term.weight) for name, term in terms.items()}
    assert weights == pytest.approx({"policy": 1.0, "value": 0.5, "entropy": -0.01})
    for term in terms.values():
        assert float(term.mean.count) == sum(LENGTHS)
    assert 0 < float(metrics["policy/clip_fraction"].total) < sum(LENGTHS)
    entropy = sum(float(output.entropy[i, t]) for i, n in enumerate(LENGTHS) for t in range(n))
    assert float(terms["entropy"].mean.total) == pytest.approx(entropy, rel=1e-5)


def test_lambda_one_without_whitening_is_return_minus_value():
    experience, _ = batch()
    algorithm = ppo(lam=1.0, kl_coef=0.0, whiten=False)
    targets, _ = algorithm.targets(experience, 2, ())
    for i, n in enumerate(LENGTHS):
        rest = float(experience.scores.outcome[i])
        for t in reversed(range(n)):
            rest += float(experience.scores.process[i, t])
            found = float(targets.advantages[i, t])
            assert found == pytest.approx(rest - float(experience.values[i, t]), abs=1e-5)
            assert float(targets.returns[i, t]) == pytest.approx(rest, abs=1e-5)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_valid_tokens():
    experience, _ = batch()
    targets, _ = ppo().targets(experience, 2, ())
    valid = np.asarray(targets.advantages)[np.asarray(targets.mask)]
    assert valid.mean() == pytest.approx(0, abs=1e-6)
    assert valid.std() == pytest.approx(1, rel=1e-5)


def test_first_gradient_is_the_plain_policy_gradient():
    """At ratio 1 nothing is clipped: the gradient of the sum is −A, token by token."""
    experience, output = batch()
    algorithm = ppo()
    targets, _ = algorithm.targets(experience, 2, ())

    def total(logprobs):
        moved = CompletionOutput(logprobs=logprobs, entropy=output.entropy, scores=output.scores)
        return algorithm.loss(moved, experience, targets, 2)[0]["policy"].mean.total

    gradient = jax.grad(total)(experience.logprobs)
    np.testing.assert_allclose(gradient, -targets.advantages, rtol=1e-6)


def test_needs_follow_the_configuration():
    assert ppo().needs.value and ppo().needs.reference
    assert not ppo(kl_coef=0.0).needs.reference


def test_impossible_values_are_refused():
    with pytest.raises(ValueError, match="unknown KL estimator 'kl'; known: k1, k2, k3"):
        ppo(kl_estimator="kl")
    with pytest.raises(ValueError, match=r"lam=1.5; wanted a number from 0 to 1"):
        ppo(lam=1.5)
    with pytest.raises(
        ValueError, match=r"dual_clip=1.1; wanted more than 1 \+ the clip above = 1.2"
    ):
        ppo(dual_clip=1.1)
    with pytest.raises(TypeError, match="klcoef"):
        ppo(klcoef=0.1)
