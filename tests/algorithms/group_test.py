"""GRPO and its descendants against loops over the papers' equations, values and gradients."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.base import has_signal
from rlhf_jax.find import find
from rlhf_jax.types import Scores
from tests.algorithms import loops
from tests.algorithms.loops import GROUP, Loss, Wanted, batch, ours

FAMILY = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
BY_SEQUENCE = "sequence_mean_token_mean"


def group_loop(experience, loss, *, scale="std", beta=0.0, estimator="k3", select=False):
    """A_i = z(r_i − β Σ_t KL_t) at every token, and the loss; with `select` groups of equal rewards
    train nothing."""
    rows = loops.rows_of(experience)
    rewards = [row.reward - beta * loops.kl_of(row, estimator) for row in rows]
    advantages = loops.everywhere(loops.compared(rewards, GROUP, scale), rows)
    kept = None
    if select:
        varies = [max(group) > min(group) for group in loops.grouped(rewards, GROUP)]
        kept = [v for v in varies for _ in range(GROUP)]
        assert not all(kept)  # the batch has such a group

    def terms(point, still):
        return loops.policy_terms(rows, advantages, loss, point, still, kept)

    return Wanted(advantages, loops.everywhere(rewards, rows), terms, kept=kept)


CASES = {
    "GRPO": (
        "grpo",
        {"clip_high": 0.2, "kl_coef": 0.04},
        Loss(how=BY_SEQUENCE, kl=0.04),
    ),
    "GRPO, wide": ("grpo", {}, Loss(high=0.28, how=BY_SEQUENCE, kl=0.001)),
    "Dr. GRPO": ("dr_grpo", {}, Loss(how="sequence_mean_token_sum_norm", constant=3000)),
    "DAPO": ("dapo", {}, Loss(high=0.28)),
    "CISPO": ("cispo", {}, Loss(form="cispo", high=5.0)),
    "CISPO, narrow": ("cispo", {"clip_high": 0.1}, Loss(form="cispo", high=0.1)),
    "DAPO with k1": (
        "dapo",
        {"kl_coef": 0.1, "kl_estimator": "k1"},
        Loss(high=0.28, kl=0.1, estimator="k1"),
    ),
    "sums, dual clip, straight-through KL, entropy": (
        "grpo",
        {
            "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, "kl_coef": 0.3,
            "kl_estimator": "k3+", "entropy_coef": 0.01, "aggregate": "sequence_mean_token_sum",
        },
        Loss(
            low=0.1, high=0.3, dual=2.0, kl=0.3, estimator="k3+", bonus=0.01,
            how="sequence_mean_token_sum",
        ),
    ),
    "KL weighted by the ratio": (
        "grpo",
        {"kl_coef": 0.3, "kl_weighted": True, "aggregate": "token_mean"},
        Loss(high=0.28, kl=0.3, weighted=True),
    ),
    "ratio of sequences, every token the same weight": (
        "grpo",
        {"ratio": "sequence", "aggregate": "token_mean", "kl_coef": 0},
        Loss(high=0.28, level="sequence"),
    ),
    "plain REINFORCE with k2": (
        "grpo",
        {"form": "reinforce", "kl_coef": 0.2, "kl_estimator": "k2"},
        Loss(form="reinforce", how=BY_SEQUENCE, kl=0.2, estimator="k2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_against_a_loop(case):
    name, options, loss = CASES[case]
    data = batch()
    scale = "none" if name == "dr_grpo" else "std"
    wanted = group_loop(data[0], loss, scale=scale, select=name == "dapo")
    found = loops.assert_agrees(name, data, wanted, **options)
    # The batch is such that clips act, and not everywhere.
    fraction = found.metrics["policy/clip_fraction"]
    if loss.form != "reinforce" and loss.high < 5:
        assert 0 < float(fraction.total) < float(fraction.count)


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3+"])
def test_kl_in_the_rewards_instead_of_the_loss(estimator):
    data = batch()
    options = {"kl_coef": 0.3, "kl_estimator": estimator, "kl_place": "reward"}
    loss = Loss(high=0.28, how=BY_SEQUENCE)
    wanted = group_loop(data[0], loss, beta=0.3, estimator=estimator)
    loops.assert_agrees("grpo", data, wanted, **options)
    placed = ours("grpo", data, **options)
    # In the loss the advantages know nothing of it.
    other = ours("grpo", data)
    assert set(placed.terms) == {"policy"} and set(other.terms) == {"policy", "kl"}
    assert not np.allclose(placed.targets.advantages, other.targets.advantages, atol=0.05)


@pytest.mark.parametrize("step", [-1e-3, 1e-3])
def test_gspo_against_its_equation(step):
    """L = −(1/K) Σ_i min(s_i A_i, clip(s_i) A_i), sequences that have tokens. The policy has moved
    to either side, so that each of ε = 3e-4 and 4e-4 acts in one of the two."""
    experience, output = batch(moved=2e-4)
    data = experience, dataclasses.replace(output, logprobs=output.logprobs + step)
    wanted = group_loop(experience, Loss())
    rows = loops.rows_of(experience)
    acted = []

    def terms(point, still):
        objectives = []
        for row, new, advantage in zip(rows, point["logprobs"], wanted.advantages, strict=True):
            if new:
                total = sum(n - o for n, o in zip(new, row.old, strict=True))
                s = math.exp(total / len(new))
                objectives.append(loops.clipped(s, advantage[0], 3e-4, 4e-4, None))
                acted.append(objectives[-1] != s * advantage[0])
        return {"policy": (1.0, -sum(objectives) / len(objectives))}

    loops.assert_agrees("gspo", data, wanted._replace(terms=terms))
    assert any(acted) and not all(acted)


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_step_rewards_to_go(scale, place):
    """DeepSeekMath 4.1.3: the rewards of all steps of a group are normalised together, and a token
    is credited with those of the steps that end at it or later."""
    data = batch()
    rows = loops.rows_of(data[0])
    beta = 0.2 if place == "reward" else 0.0
    outcomes = [row.outcome - beta * loops.kl_of(row, "k3") for row in rows]
    compared = loops.compared(outcomes, GROUP, scale)
    advantages = []
    for first in range(0, len(rows), GROUP):
        group = rows[first : first + GROUP]
        places = [(i, t) for i, row in enumerate(group) for t, end in enumerate(row.ends) if end]
        scores = [group[i].process[t] for i, t in places]
        normal = dict(zip(places, loops.compared(scores, max(len(scores), 1), scale), strict=True))
        for i, row in enumerate(group):
            later = loops.to_go([normal.get((i, t), 0.0) for t in range(len(row.old))])
            advantages.append([compared[first + i] + x for x in later])
    returns = [o + sum(row.process) for o, row in zip(outcomes, rows, strict=True)]
    loss = Loss(high=0.28, how=BY_SEQUENCE, kl=0.2 if place == "loss" else 0.0)

    def terms(point, still):
        return loops.policy_terms(rows, advantages, loss, point, still)

    loops.assert_agrees(
        "grpo",
        data,
        Wanted(advantages, loops.everywhere(returns, rows), terms),
        credit="steps",
        scale=scale,
        kl_coef=0.2,
        kl_place=place,
    )


@pytest.mark.parametrize("credit", ["sequence", "steps"])
@pytest.mark.parametrize("score", [0.0, 0.1, -7.3])
def test_equal_rewards_give_exactly_nothing(score, credit):
    found = ours("grpo", batch(outcome=score, process=0.0), kl_coef=0.0, credit=credit)
    np.testing.assert_array_equal(found.targets.advantages, 0)
    np.testing.assert_array_equal(found.gradient.logprobs, 0)
    assert loops.means(found) == {"policy": (1.0, 0.0)}


@pytest.mark.parametrize("name", FAMILY)
def test_all_shelved_relatives_know_equal_rewards(name):
    options = {"kl_coef": 0.0}
    found = ours(name, batch(outcome=0.1, process=0.0), **options)
    np.testing.assert_array_equal(found.targets.advantages, 0)
    np.testing.assert_array_equal(found.gradient.logprobs, 0)


def test_dr_grpo_weighs_wide_groups_more():
    """Spreads .1 and 10 give advantages in ratio .01; divided by the spread they are the same."""
    outcome = np.random.default_rng(3).normal(size=len(loops.LENGTHS))
    narrow, wide = (batch(outcome=scale * outcome, process=0.0) for scale in (0.1, 10.0))
    small, large = (np.asarray(ours("dr_grpo", d).targets.advantages) for d in (narrow, wide))
    mask = np.asarray(narrow[0].rollouts.mask)
    np.testing.assert_allclose((small / np.where(mask, large, 1))[mask], 0.01, rtol=1e-4)
    small, large = (np.asarray(ours("dapo", d).targets.advantages) for d in (narrow, wide))
    np.testing.assert_allclose(small, large, rtol=1e-4)


@pytest.mark.parametrize(("name", "alone"), [("dr_grpo", True), ("dapo", False)])
def test_a_longer_wrong_answer_leaves_the_others_alone_under_dr_grpo(name, alone):
    """Row 3 is the worst of its group. Its tokens twice: the gradient of the rest stays."""
    outcome = np.array([1.0, 0.5, 0.2, -2.0] * 3)
    short, long = (3, 2, 1, 2) * 3, (3, 2, 1, 4) * 3
    gradients = []
    for lengths in (short, long):
        data = batch(lengths=lengths, outcome=outcome, process=0.0)
        copied = dataclasses.replace(data[1], logprobs=data[0].logprobs)
        found = ours(name, (data[0], copied))
        gradients.append(np.asarray(found.gradient.logprobs)[[0, 1, 2, 4, 5, 6]])
    same = np.allclose(*gradients, rtol=1e-6, atol=0)
    assert same is alone
    # And a token of the wrong answer costs what it did: length does not make it cheaper.
    if alone:
        assert gradients[0][0, 0] != 0


def test_gspo_of_one_token_is_the_ratio_of_ppo():
    data = batch(lengths=(1,) * 12)
    by_sequence = ours("gspo", data, clip_low=0.2, clip_high=0.2)
    by_token = ours("grpo", data, clip_high=0.2, kl_coef=0.0)
    np.testing.assert_allclose(loops.means(by_sequence)["policy"], loops.means(by_token)["policy"])
    np.testing.assert_array_equal(by_sequence.gradient.logprobs, by_token.gradient.logprobs)


def test_gspo_does_not_know_how_often_equal_ratios_come():
    """Every token of row i has ratio 1 + i/10,000: s is that at 2 tokens and at 4."""
    ratio, found = 1 + 1e-4 * np.arange(12), []
    for lengths in ((2,) * 12, (4,) * 12):
        experience, output = batch(lengths=lengths, outcome=np.arange(12.0), process=0.0)
        step = jnp.asarray(np.log(ratio)[:, None], jnp.float32)
        moved = dataclasses.replace(output, logprobs=experience.logprobs + step)
        found.append(ours("gspo", (experience, moved)))
    advantages = np.asarray(found[0].targets.advantages[:, 0], np.float64)
    objective = np.minimum(ratio * advantages, np.clip(ratio, 1 - 3e-4, 1 + 4e-4) * advantages)
    for one in found:
        mean = one.metrics["policy/ratio"]
        np.testing.assert_allclose(mean.total / mean.count, ratio.mean(), rtol=1e-6)
        np.testing.assert_allclose(loops.means(one)["policy"][1], -objective.mean(), atol=2e-7)
    # A clipped row (its ratio beyond 1.0004, its advantage above 0) has no gradient at any length.
    silent = (ratio > 1 + 4e-4) & (advantages > 0)
    assert 0 < silent.sum() < 12
    for one in found:
        gradient = np.asarray(one.gradient.logprobs)
        np.testing.assert_array_equal((gradient != 0).any(axis=1), ~silent)


def test_cispo_keeps_the_gradient_that_ppo_drops():
    """Ratio 9 beyond 1 + 5: −(1 + ε) A / tokens where A > 0, and nothing under PPO's minimum."""
    experience, output = batch(lengths=(1,) * 12, outcome=[1.0, 0.0] * 6, process=0.0)
    moved = dataclasses.replace(output, logprobs=experience.logprobs + math.log(9.0))
    found, silenced = (ours(n, (experience, moved)) for n in ("cispo", "dapo"))
    advantages = np.asarray(found.targets.advantages[:, 0])
    np.testing.assert_allclose(advantages, [1.0, -1.0] * 6, rtol=1e-5)
    np.testing.assert_allclose(found.gradient.logprobs[:, 0], -6 * advantages / 12, rtol=1e-5)
    np.testing.assert_allclose(silenced.gradient.logprobs[:, 0], [0, 9 / 12] * 6, rtol=1e-5)
    assert float(found.metrics["policy/clip_fraction"].total) == 12


def test_dual_clip_by_hand():
    """A = −1, ρ = 10, c = 3: the objective is −3, and nothing pushes that token any more."""
    experience, output = batch(lengths=(1,) * 12, outcome=[1.0, 0.0] * 6, process=0.0)
    step = jnp.where(jnp.arange(12) % 2 == 0, 0.0, math.log(10.0))[:, None]
    moved = dataclasses.replace(output, logprobs=experience.logprobs + step)
    found = ours("grpo", (experience, moved), dual_clip=3.0, kl_coef=0.0)
    np.testing.assert_allclose(loops.means(found)["policy"][1], -(1 - 3) / 2, rtol=1e-5)
    np.testing.assert_allclose(found.gradient.logprobs[:, 0], [-1 / 12, 0] * 6, rtol=1e-5)


def test_has_signal_is_false_of_equal_rewards_alone():
    outcome = jnp.array([0.3] * 4 + [0, 0, 0, 1] + [0.5, 0.2, 0.5, 0.5], jnp.float32)
    process = jnp.zeros((12, 3)).at[9, 1].set(0.3)  # 0.2 + 0.3: what is equal is the sum
    scores = Scores(outcome=outcome, process=process, parts={})
    np.testing.assert_array_equal(has_signal(scores, GROUP), [False, True, False])
    chosen = find("algorithms", "dapo")().select
    np.testing.assert_array_equal(chosen(scores, GROUP), [False, True, False])
    assert all(find("algorithms", name)().select is None for name in FAMILY if name != "dapo")


def test_choices_and_constants_are_refused():
    for options, message in [
        ({"scale": "mad"}, "unknown scale 'mad'; known: std, none"),
        ({"credit": "token"}, "unknown credit 'token'; known: sequence, steps"),
        ({"aggregate": "mean"}, "unknown aggregation 'mean'"),
        ({"aggregate": "sequence_mean_token_sum_norm"}, "needs a constant above 0, got None"),
        ({"constant": 512}, "uses no constant, got 512"),
        ({"ratio": "turn"}, "unknown ratio 'turn'; known: token, sequence"),
        ({"kl_place": "reward", "kl_weighted": True}, "rewards have no ratio; set kl_place='loss'"),
    ]:
        with pytest.raises(ValueError, match=message):
            find("algorithms", "grpo")(**options)
    with pytest.raises(ValueError, match="needs a constant above 0, got 0"):
        find("algorithms", "dr_grpo")(constant=0)


@pytest.mark.parametrize("name", [*FAMILY, "rloo", "best_of_n", "superhf", "online_dpo"])
def test_comparisons_need_two(name):
    assert find("algorithms", name)().needs.min_group == 2


@pytest.mark.parametrize("name", FAMILY)
def test_needs_and_refusals(name):
    factory = find("algorithms", name)
    assert factory(kl_coef=0.1).needs.reference and not factory(kl_coef=0.1).needs.value
    assert not factory(kl_coef=0.0).needs.reference
    with pytest.raises(ValueError, match=r"kl_coef=-0.1; wanted 0 or more"):
        factory(kl_coef=-0.1)
    with pytest.raises(ValueError, match=r"unknown KL estimator 'k4'; known: k1, k2, k3, k3\+"):
        factory(kl_estimator="k4")
    if name != "cispo":  # which has no clip below
        with pytest.raises(ValueError, match=r"clip_low=1.5; wanted 0 to 1"):
            factory(clip_low=1.5)
