"""PPO against a loop, values and gradients, and its reductions."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.algorithms.ppo import ppo
from tests.algorithms import loops
from tests.algorithms.loops import Loss, Wanted, batch, ours


def ppo_loop(
    experience, loss, *, gamma=1.0, lam=0.95, critic_lam=None, beta=0.0, estimator="k1",
    white=True, value_clip=0.2, value_coef=1.0, alpha=None,
):  # fmt: skip
    """PPO as it is written down, with rewards per token and the clipped value loss."""
    rows = loops.rows_of(experience)
    rewards = [loops.token_rewards(row, beta, estimator) for row in rows]

    def estimates(lam, alpha=None):
        lams = [lam if alpha is None else loops.adaptive_lambda(row, alpha) for row in rows]
        return [
            loops.gae(r, row.values, gamma, own)
            for r, row, own in zip(rewards, rows, lams, strict=True)
        ]

    advantages = estimates(lam, alpha)
    learnt = advantages if critic_lam is None else estimates(critic_lam)
    returns = [
        [a + v for a, v in zip(row_advantages, row.values, strict=True)]
        for row_advantages, row in zip(learnt, rows, strict=True)
    ]
    if white:
        advantages = loops.whitened(advantages)

    def terms(point, still):
        errors = []
        for new_values, row, goal in zip(point["value"], rows, returns, strict=True):
            errors.append([])
            for new, old, target in zip(new_values, row.values, goal, strict=True):
                error = (new - target) ** 2
                if value_clip is not None:
                    near = min(max(new, old - value_clip), old + value_clip)
                    error = max(error, (near - target) ** 2)
                errors[-1].append(0.5 * error)
        value = {"value": (value_coef, loops.mean_over(errors, "token_mean"))}
        return loops.policy_terms(rows, advantages, loss, point, still) | value

    return Wanted(advantages, returns, terms)


CASES = {
    "default": ({}, Loss(dual=3.0), {"beta": 0.02}),
    "everything": (
        {
            "gamma": 0.97, "lam": 0.9, "kl_coef": 0.2, "kl_estimator": "k3", "clip": 0.1,
            "clip_high": 0.4, "dual_clip": 1.5, "value_coef": 0.5, "value_clip": 0.1,
            "entropy_coef": 0.01,
        },
        Loss(low=0.1, high=0.4, dual=1.5, bonus=0.01),
        {
            "gamma": 0.97, "lam": 0.9, "beta": 0.2, "estimator": "k3", "value_coef": 0.5,
            "value_clip": 0.1,
        },
    ),
    "decoupled λ": (
        {"lam": 0.9, "value_lam": 1.0, "kl_coef": 0.0},
        Loss(dual=3.0),
        {"lam": 0.9, "critic_lam": 1.0},
    ),
    "λ by length, whole returns for the critic": (
        {"lam_alpha": 0.5, "value_lam": 1.0, "kl_coef": 0.1, "clip_high": 0.28, "dual_clip": None},
        Loss(high=0.28),
        {"alpha": 0.5, "critic_lam": 1.0, "beta": 0.1},
    ),
    "λ by length for both": (
        {"lam_alpha": 0.4, "kl_coef": 0.0, "whiten": False},
        Loss(dual=3.0),
        {"alpha": 0.4, "white": False},
    ),
    "KL in the loss, free values, no whitening, no dual clip": (
        {
            "kl_coef": 0.3, "kl_estimator": "k2", "kl_place": "loss", "value_clip": None,
            "whiten": False, "dual_clip": None,
        },
        Loss(kl=0.3, estimator="k2"),
        {"white": False, "value_clip": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_against_a_loop(case):
    options, loss, loop = CASES[case]
    data = batch()
    found = loops.assert_agrees("ppo", data, ppo_loop(data[0], loss, **loop), **options)
    fraction = found.metrics["policy/clip_fraction"]
    assert 0 < float(fraction.total) < float(fraction.count) == sum(loops.LENGTHS)
    for term in found.terms.values():
        assert float(term.mean.count) == sum(loops.LENGTHS)


def test_groups_of_one():
    data = batch(group=1)
    loops.assert_agrees("ppo", data, ppo_loop(data[0], Loss(dual=3.0), beta=0.02), group=1)
    assert ppo().needs.min_group == 1


def test_what_the_critic_learns_does_not_know_the_actors_lambda():
    """Decoupled λ: with 1 for the critic its targets are the rewards to go."""
    data = batch()
    found = ours("ppo", data, lam=0.9, value_lam=1.0, kl_coef=0.0)
    rewards = [loops.to_go(loops.token_rewards(row)) for row in loops.rows_of(data[0])]
    np.testing.assert_allclose(found.targets.returns, loops.padded(rewards), rtol=1e-5, atol=1e-6)
    coupled = ours("ppo", data, lam=0.9, kl_coef=0.0)
    np.testing.assert_array_equal(found.targets.advantages, coupled.targets.advantages)
    assert not np.allclose(found.targets.returns, coupled.targets.returns, atol=0.05)


def test_lambda_one_without_whitening_is_return_minus_value():
    data = batch()
    targets = ours("ppo", data, lam=1.0, kl_coef=0.0, whiten=False).targets
    rows = loops.rows_of(data[0])
    returns = [loops.to_go(loops.token_rewards(row)) for row in rows]
    values = loops.padded([row.values for row in rows])
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(targets.returns, loops.padded(returns), **near)
    np.testing.assert_allclose(targets.advantages, loops.padded(returns) - values, **near)


def test_first_gradient_is_the_plain_policy_gradient():
    """At ratio 1 nothing is clipped: the gradient is −A over the tokens, token by token."""
    experience, output = batch()
    first = dataclasses.replace(output, logprobs=experience.logprobs)
    found = ours("ppo", (experience, first))
    wanted = -np.asarray(found.targets.advantages) / sum(loops.LENGTHS)
    np.testing.assert_allclose(found.gradient.logprobs, wanted, rtol=1e-5)
    valid = np.asarray(found.targets.advantages)[np.asarray(experience.rollouts.mask)]
    assert valid.mean() == pytest.approx(0, abs=1e-6)
    assert valid.std() == pytest.approx(1, rel=1e-5)


def test_equal_returns_without_a_critics_opinion_give_nothing():
    """Values that say nothing and equal rewards at the end: whitened, exactly 0."""
    experience, output = batch(outcome=-7.3, process=0.0)
    blank = dataclasses.replace(experience, values=0.0 * experience.values)
    found = ours("ppo", (blank, output), lam=1.0, kl_coef=0.0)
    np.testing.assert_array_equal(found.targets.advantages, 0)
    np.testing.assert_array_equal(found.gradient.logprobs, 0)
    assert np.isfinite(found.gradient.scores["value"]).all()


def test_needs_follow_the_configuration():
    assert ppo().needs.value and ppo().needs.reference
    assert not ppo(kl_coef=0.0).needs.reference
    assert ppo(kl_place="loss").needs.reference


def test_impossible_values_are_refused():
    with pytest.raises(ValueError, match="unknown KL estimator 'kl'; known: k1, k2, k3"):
        ppo(kl_estimator="kl")
    for name in ("gamma", "lam", "value_lam"):
        with pytest.raises(ValueError, match=rf"{name}=1.5; wanted a number from 0 to 1"):
            ppo(**{name: 1.5})
    with pytest.raises(ValueError, match=r"dual_clip=1.1; wanted .* 1 \+ the clip above = 1.2"):
        ppo(dual_clip=1.1)
    with pytest.raises(ValueError, match=r"dual_clip=1.3; wanted .* 1 \+ the clip above = 1.4"):
        ppo(dual_clip=1.3, clip_high=0.4)
    with pytest.raises(ValueError, match=r"ppo: clip=1.2; wanted a number from 0 to 1"):
        ppo(clip=1.2)
    with pytest.raises(ValueError, match=r"value_clip=-1; wanted more than 0, or None"):
        ppo(value_clip=-1)
    with pytest.raises(ValueError, match=r"value_coef=-1; wanted 0 or more"):
        ppo(value_coef=-1)
    with pytest.raises(ValueError, match=r"kl_coef=-0.02; wanted 0 or more"):
        ppo(kl_coef=-0.02)
    with pytest.raises(ValueError, match="unknown kl_place 'critic'; known: loss, reward"):
        ppo(kl_place="critic")
    with pytest.raises(ValueError, match=r"lam=0.9 and lam_alpha=0.05 are both λ; leave one of"):
        ppo(lam=0.9, lam_alpha=0.05)
    with pytest.raises(ValueError, match=r"lam_alpha=0; wanted more than 0, such as 0.05"):
        ppo(lam_alpha=0)
    with pytest.raises(TypeError, match="klcoef"):
        ppo(klcoef=0.1)
