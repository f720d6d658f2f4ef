"""RLOO, REINFORCE++ and PE-RLHF's REINFORCE against loops, and on a bandit of known gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.pe_reinforce import pe_reinforce
from rlhf_jax.algorithms.reinforce_plus_plus import reinforce_plus_plus
from rlhf_jax.algorithms.rloo import rloo
from rlhf_jax.ops import groups
from tests.algorithms import loops
from tests.algorithms.loops import GROUP, Loss, Wanted, batch, ours


def with_terms(rows, advantages, returns, loss):
    def terms(point, still):
        return loops.policy_terms(rows, advantages, loss, point, still)

    return Wanted(advantages, returns, terms)


@pytest.mark.parametrize(
    ("options", "beta", "loss"),
    [
        ({}, 0.03, Loss(form="reinforce", how="sequence_mean_token_sum")),
        (
            {"kl_coef": 0.4, "kl_estimator": "k3", "form": "clip", "clip_high": 0.3},
            0.4,
            Loss(high=0.3, how="sequence_mean_token_sum"),
        ),
        ({"kl_coef": 0, "form": "cispo", "aggregate": "token_mean"}, 0.0, Loss(form="cispo")),
    ],
    ids=["published", "clipped", "cispo"],
)
def test_rloo_against_a_loop(options, beta, loss):
    data = batch()
    rows = loops.rows_of(data[0])
    estimator = options.get("kl_estimator", "k1")
    rewards = [row.reward - beta * loops.kl_of(row, estimator) for row in rows]
    advantages = []
    for i, reward in enumerate(rewards):
        first = i - i % GROUP
        others = [rewards[j] for j in range(first, first + GROUP) if j != i]
        advantages.append(reward - sum(others) / len(others))
    advantages, returns = (loops.everywhere(x, rows) for x in (advantages, rewards))
    wanted = with_terms(rows, advantages, returns, loss)
    loops.assert_agrees("rloo", data, wanted, **options)


def reinforce_plus_plus_loop(experience, loss, *, gamma=1.0, beta=0.0, estimator="k1", size=None):
    """A = (G − mean) / std over the tokens of the batch, of rewards less `size`'s group mean."""
    rows = loops.rows_of(experience)
    rewards = [loops.token_rewards(row, beta, estimator) for row in rows]
    if size:
        totals = [row.reward - beta * loops.kl_of(row, estimator) for row in rows]
        centred = loops.compared(totals, size, "none")
        for reward, total, difference in zip(rewards, totals, centred, strict=True):
            if reward:
                reward[-1] -= total - difference
    returns = [loops.to_go(reward, gamma) for reward in rewards]
    return with_terms(rows, loops.whitened(returns), returns, loss)


@pytest.mark.parametrize(
    ("options", "loss", "loop"),
    [
        ({}, Loss(), {"beta": 0.01}),
        (
            {"gamma": 0.9, "kl_coef": 0.3, "kl_estimator": "k3", "clip_high": 0.4},
            Loss(high=0.4),
            {"gamma": 0.9, "beta": 0.3, "estimator": "k3"},
        ),
        ({"baseline": "group", "kl_coef": 0.3}, Loss(), {"size": GROUP, "beta": 0.3}),
        (
            {
                "baseline": "group", "kl_coef": 0.1, "kl_estimator": "k2", "kl_place": "loss",
                "entropy_coef": 0.02,
            },
            Loss(kl=0.1, estimator="k2", bonus=0.02),
            {"size": GROUP},
        ),
    ],
    ids=["published", "discounted", "baseline", "baseline as published"],
)  # fmt: skip
def test_reinforce_plus_plus_against_a_loop(options, loss, loop):
    data = batch()
    wanted = reinforce_plus_plus_loop(data[0], loss, **loop)
    found = loops.assert_agrees("reinforce_plus_plus", data, wanted, **options)
    fraction = found.metrics["policy/clip_fraction"]
    assert 0 < float(fraction.total) < float(fraction.count)


def test_reinforce_plus_plus_takes_groups_of_one():
    data = batch(group=1)
    wanted = reinforce_plus_plus_loop(data[0], Loss(), beta=0.01)
    loops.assert_agrees("reinforce_plus_plus", data, wanted, group=1)
    assert reinforce_plus_plus().needs.min_group == 1
    assert reinforce_plus_plus(baseline="group").needs.min_group == 2


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_reinforce_plus_plus_advantages_are_white_over_valid_tokens(baseline):
    data = batch()
    advantages = ours("reinforce_plus_plus", data, baseline=baseline).targets.advantages
    mask = np.asarray(data[0].rollouts.mask)
    valid = np.asarray(advantages)[mask]
    assert valid.mean() == pytest.approx(0, abs=1e-6)
    assert valid.std() == pytest.approx(1, rel=1e-5)
    np.testing.assert_array_equal(np.asarray(advantages)[~mask], 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rloo", {"kl_coef": 0.0}),
        ("reinforce_plus_plus", {"kl_coef": 0.0}),
        ("reinforce_plus_plus", {"kl_coef": 0.0, "baseline": "group"}),
    ],
)
@pytest.mark.parametrize("score", [0.0, 0.1, -7.3])
def test_equal_rewards_give_no_gradient(name, options, score):
    found = ours(name, batch(outcome=score, process=0.0), **options)
    np.testing.assert_array_equal(found.targets.advantages, 0)
    np.testing.assert_array_equal(found.gradient.logprobs, 0)


@pytest.mark.parametrize(
    ("options", "beta", "weight", "how", "group"),
    [
        ({}, 0.05, 1.0, "sequence_mean_token_sum", GROUP),
        ({}, 0.05, 1.0, "sequence_mean_token_sum", 1),
        (
            {"kl_coef": 0.6, "value_coef": 0.5, "aggregate": "token_mean"},
            0.6,
            0.5,
            "token_mean",
            GROUP,
        ),
        ({"kl_coef": 0}, 0.0, 1.0, "sequence_mean_token_sum", GROUP),
    ],
    ids=["published", "groups of one", "tokens", "no anchor"],
)
def test_pe_reinforce_against_a_loop(options, beta, weight, how, group):
    """R = (1 − β) r − β (log π − log π_anchor), one number for all tokens; A = R − V_t."""
    data = batch(group=group)
    rows = loops.rows_of(data[0])
    rewards = [(1 - beta) * row.reward - beta * loops.kl_of(row, "k1") for row in rows]
    returns = loops.everywhere(rewards, rows)
    advantages = [[r - v for v in row.values] for r, row in zip(rewards, rows, strict=True)]
    policy = with_terms(rows, advantages, returns, Loss(form="reinforce", how=how))

    def terms(point, still):
        errors = [
            [(v - reward) ** 2 for v in values]
            for reward, values in zip(rewards, point["value"], strict=True)
        ]
        value = {"value": (weight, loops.mean_over(errors, how))}
        return policy.terms(point, still) | value

    loops.assert_agrees("pe_reinforce", data, policy._replace(terms=terms), group=group, **options)


def test_pe_reinforce_needs_and_refusals():
    assert pe_reinforce().needs.value and pe_reinforce().needs.min_group == 1
    assert not pe_reinforce(kl_coef=0.0).needs.reference
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"kl_coef={share}; wanted a share of the reward"):
            pe_reinforce(kl_coef=share)


def test_rloo_and_reinforce_plus_plus_refuse():
    with pytest.raises(ValueError, match="leave_one_out needs groups of 2 or more"):
        rloo().targets(batch(group=1)[0], 1, ())
    with pytest.raises(ValueError, match="unknown form 'ppo'; known: clip, cispo, reinforce"):
        rloo(form="ppo")
    with pytest.raises(ValueError, match=r"clip_low=2; wanted 0 to 1"):
        rloo(clip_low=2)
    with pytest.raises(ValueError, match="unknown baseline 'batch'; known: none, group"):
        reinforce_plus_plus(baseline="batch")
    with pytest.raises(ValueError, match=r"gamma=1.1; wanted a number from 0 to 1"):
        reinforce_plus_plus(gamma=1.1)
    with pytest.raises(ValueError, match=r"unknown kl_place 'rewards'; known: loss, reward"):
        reinforce_plus_plus(kl_place="rewards")


# A bandit of three arms, whose policy gradient is known: ∂/∂θ_a E r = π_a (r_a − E r).
ARMS, POLICY = np.array([1.0, 0.2, -0.5]), np.array([0.5, 0.3, 0.2])


def bandit_gradients(advantages_of, draws, size, seed=0):
    """Per group: mean over its samples of A ∇_θ log π, [groups 3]."""
    rng = np.random.default_rng(seed)
    arms = rng.choice(3, p=POLICY, size=draws)
    rewards = ARMS[arms] + rng.normal(size=draws)  # fresh noise in every reward
    advantages = np.asarray(advantages_of(jnp.asarray(rewards, jnp.float32)), np.float64)
    slopes = np.eye(3)[arms] - POLICY
    return (advantages[:, None] * slopes).reshape(-1, size, 3).mean(axis=1)


@pytest.mark.parametrize("size", [2, 4])
def test_rloo_is_unbiased_on_a_bandit(size):
    """Within 3 standard errors of the true gradient; the plain centring is short by (K − 1)/K."""
    true = POLICY * (ARMS - POLICY @ ARMS)
    found = bandit_gradients(lambda r: groups.leave_one_out(r, size), 100_000, size)
    error = found.std(axis=0) / np.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - true) < 3 * error)
    short = bandit_gradients(lambda r: r - groups.group_mean(r, size), 100_000, size)
    assert np.any(np.abs(short.mean(axis=0) - true) > 5 * error)
    np.testing.assert_allclose(short * size / (size - 1), found, rtol=1e-3, atol=1e-5)


def test_the_loss_of_rloo_is_what_the_bandit_shows():
    """One token per completion: the whole algorithm gives −Σ A ∇ log π / B."""
    rng = np.random.default_rng(1)
    arms = rng.integers(0, 3, size=12)
    experience, output = batch(lengths=(1,) * 12, outcome=ARMS[arms], process=0.0)

    def loss(logits):
        logprobs = jax.nn.log_softmax(logits)[jnp.asarray(arms)]
        moved = output.logprobs.at[:, 0].set(logprobs)
        algorithm = rloo(kl_coef=0.0)
        targets, _ = algorithm.targets(experience, GROUP, ())
        new = type(output)(logprobs=moved, entropy=output.entropy, scores=output.scores)
        mean = algorithm.loss(new, experience, targets, GROUP)[0]["policy"].mean
        return mean.total / mean.count

    gradient = jax.jit(jax.grad(loss))(jnp.log(jnp.asarray(POLICY, jnp.float32)))
    rewards = ARMS[arms].reshape(-1, GROUP)
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / (GROUP - 1)
    advantages = (rewards - others).reshape(-1)
    wanted = -(advantages[:, None] * (np.eye(3)[arms] - POLICY)).mean(axis=0)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)
