"""Where one method is another: values and gradients of two members of the shelf, side by side."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.algorithms import loops
from tests.algorithms.loops import GROUP, LENGTHS, batch, ours

EQUAL_LENGTHS = (5,) * len(LENGTHS)


def assert_same(a, b, *, scale=1.0, rtol=1e-5):
    """Policy term and its gradient of a are `scale` times those of b."""
    policy, other = loops.means(a)["policy"][1], loops.means(b)["policy"][1]
    np.testing.assert_allclose(policy, scale * other, rtol=rtol, atol=1e-6)
    gradient = scale * np.asarray(b.gradient.logprobs)
    assert gradient.any()
    np.testing.assert_allclose(a.gradient.logprobs, gradient, rtol=rtol, atol=1e-7)


def at_the_start(data):
    """The policy that sampled: all ratios are 1."""
    experience, output = data
    return experience, dataclasses.replace(output, logprobs=experience.logprobs)


def test_dapo_with_equal_clips_and_lengths_is_grpo():
    """Per token always, and GRPO's own mean where all completions are equally long; of groups whose
    rewards differ, since DAPO leaves the others out."""
    options = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}
    outcome = np.linspace(-1.0, 1.0, len(EQUAL_LENGTHS))
    ragged, even = batch(outcome=outcome), batch(outcome=outcome, lengths=EQUAL_LENGTHS)
    by_token = ours("grpo", ragged, aggregate="token_mean", **options)
    assert_same(ours("dapo", ragged, **options), by_token, rtol=0)
    assert_same(ours("dapo", even, **options), ours("grpo", even, **options))
    fraction = by_token.metrics["policy/clip_fraction"]
    assert 0 < float(fraction.total) < float(fraction.count)  # not for want of a clip


def test_dr_grpo_is_grpo_without_std_where_lengths_are_equal():
    even = batch(lengths=EQUAL_LENGTHS)
    grpo = ours("grpo", even, scale="none", clip_high=0.2, kl_coef=0.0)
    assert_same(ours("dr_grpo", even, constant=5), grpo)
    assert_same(ours("dr_grpo", even), grpo, scale=5 / 3000)


def test_rloo_is_k_over_k_minus_1_times_centred():
    data = batch()
    options = {"form": "reinforce", "aggregate": "sequence_mean_token_sum", "kl_coef": 0.0}
    centred = ours("grpo", data, scale="none", **options)
    left_out = ours("rloo", data, kl_coef=0.0)
    assert_same(left_out, centred, scale=GROUP / (GROUP - 1))
    np.testing.assert_allclose(
        left_out.targets.advantages, 4 / 3 * np.asarray(centred.targets.advantages), rtol=1e-6
    )


def test_at_the_start_every_form_has_one_gradient():
    """Ratio 1: min(ρ A, clip(ρ) A), sg(ρ) A log π and A log π all have the gradient A."""
    data = at_the_start(batch())
    first, *others = (
        ours("rloo", data, form=f, kl_coef=0.0) for f in ("clip", "cispo", "reinforce")
    )
    by_token, by_sequence = ours("grpo", data, kl_coef=0.0), ours("gspo", data)
    for a, b in [(first, others[0]), (first, others[1]), (by_token, by_sequence)]:
        assert np.asarray(a.gradient.logprobs).any()
        np.testing.assert_allclose(a.gradient.logprobs, b.gradient.logprobs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [64, 4096])
def test_grpo_without_std_and_k_large_is_reinforce_with_baseline(size):
    """On a bandit the mean of a large group is the expected reward: what differs is of order 1/√K
    in the advantages, and of order 1/K in the gradient."""
    arms, policy = np.array([1.0, 0.2, -0.5]), np.array([0.5, 0.3, 0.2])
    expected = policy @ arms
    spread = np.sqrt(policy @ (arms - expected) ** 2)
    drawn = np.random.default_rng(0).choice(3, p=policy, size=16 * size)
    data = batch(group=size, lengths=(1,) * len(drawn), outcome=arms[drawn], process=0.0)
    options = {"scale": "none", "form": "reinforce", "aggregate": "token_mean", "kl_coef": 0.0}
    found = ours("grpo", data, group=size, **options)
    baseline = arms[drawn] - expected
    advantages = np.asarray(found.targets.advantages, np.float64)[:, 0]
    assert np.abs(advantages - baseline).max() < 4 * spread / np.sqrt(size)

    def gradients(of_logprobs):
        """−∂L/∂θ per group, for the logits θ of the bandit."""
        terms = of_logprobs[:, None] * (np.eye(3)[drawn] - policy)
        return terms.reshape(-1, size, 3).mean(axis=1)

    reinforce = gradients(baseline)
    grpo = gradients(-np.asarray(found.gradient.logprobs, np.float64)[:, 0] * len(drawn))
    assert np.abs(grpo - reinforce).max() < 8 * spread / size
    assert np.abs(reinforce).max() > 0.1


def test_grpo_without_std_subtracts_the_mean_and_nothing_else():
    """With the group's mean as REINFORCE's baseline they are one, at any K."""
    experience, output = batch(process=0.0)
    grpo = ours(
        "grpo", (experience, output), scale="none", form="reinforce", kl_coef=0.0,
        aggregate="sequence_mean_token_sum",
    )  # fmt: skip
    outcome = np.asarray(experience.scores.outcome)
    mean = np.repeat(outcome.reshape(-1, GROUP).mean(axis=1), GROUP)
    values = jnp.asarray(np.broadcast_to(mean[:, None], experience.values.shape), jnp.float32)
    with_baseline = dataclasses.replace(experience, values=values)
    assert_same(grpo, ours("pe_reinforce", (with_baseline, output), kl_coef=0.0), rtol=1e-4)


def test_ppo_on_its_first_step_with_lambda_1_is_advantage_reinforce():
    """One epoch, nothing clipped: −A ∇ log π with A = R − V. PE-RLHF's REINFORCE is exactly that
    where the reward comes at the end."""
    data = at_the_start(batch(process=0.0))
    options = {"lam": 1.0, "kl_coef": 0.0, "whiten": False, "value_clip": None}
    ppo = ours("ppo", data, **options)
    reinforce = ours("pe_reinforce", data, kl_coef=0.0, aggregate="token_mean")
    gradient = np.asarray(reinforce.gradient.logprobs)
    assert gradient.any() and float(ppo.metrics["policy/clip_fraction"].total) == 0
    np.testing.assert_allclose(ppo.gradient.logprobs, gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(  # ½ (V − R)² against (V − R)²
        2 * ppo.gradient.scores["value"], reinforce.gradient.scores["value"], rtol=1e-5, atol=1e-6
    )


def test_ppo_without_a_critic_is_reinforce_plus_plus():
    """Values that say nothing, λ = 1: the advantage is the whitened reward to go."""
    experience, output = batch()
    blank = dataclasses.replace(experience, values=0.0 * experience.values)
    options = {"gamma": 0.9, "kl_coef": 0.1}
    ppo = ours("ppo", (blank, output), lam=1.0, dual_clip=None, **options)
    plus = ours("reinforce_plus_plus", (experience, output), **options)
    assert_same(ppo, plus)


def test_reinforce_plus_plus_of_outcomes_is_a_z_score_over_the_batch():
    even = batch(lengths=EQUAL_LENGTHS, process=0.0)
    found = ours("reinforce_plus_plus", even, kl_coef=0.0)
    outcome = np.asarray(even[0].scores.outcome, np.float64)
    wanted = (outcome - outcome.mean()) / outcome.std()
    np.testing.assert_allclose(found.targets.advantages[:, 0], wanted, rtol=1e-5)
    # A batch of one group: GRPO.
    one = batch(lengths=EQUAL_LENGTHS[:GROUP], outcome=[1.0, 0.0, 0.5, 0.2], process=0.0)
    grpo = ours("grpo", one, kl_coef=0.0, clip_high=0.2)
    assert_same(ours("reinforce_plus_plus", one, kl_coef=0.0), grpo)


def test_cispo_within_its_clip_weighs_as_grpo_does():
    """No ratio beyond 1 + ε: ρ A ∇ log π, the gradient of GRPO where nothing is clipped."""
    data = batch(moved=0.1)
    free = ours("grpo", data, clip_low=1.0, clip_high=1e6, kl_coef=0.0, aggregate="token_mean")
    cispo = ours("cispo", data)
    gradient = np.asarray(free.gradient.logprobs)
    assert gradient.any() and float(cispo.metrics["policy/clip_fraction"].total) == 0
    np.testing.assert_allclose(cispo.gradient.logprobs, gradient, rtol=1e-5, atol=1e-7)


def test_gspo_is_grpo_with_the_ratio_of_the_sequence():
    data = batch()
    options = {"clip_low": 0.1, "clip_high": 0.2, "kl_coef": 0.0}
    assert_same(ours("gspo", data, **options), ours("grpo", data, ratio="sequence", **options))


def test_superhf_without_an_anchor_is_best_of_n():
    data = batch()
    assert_same(ours("superhf", data, kl_coef=0), ours("best_of_n", data), rtol=0)


def test_steps_that_say_nothing_leave_the_outcome():
    data = batch(process=0.0)
    by_step, whole = (ours("grpo", data, credit=c, kl_coef=0.0) for c in ("steps", "sequence"))
    assert_same(by_step, whole)
