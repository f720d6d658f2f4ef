"""Best-of-n, SuperHF and expert iteration against loops: which samples are imitated, and how."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.algorithms.best_of_n import best_of_n
from rlhf_jax.algorithms.expert_iteration import expert_iteration
from rlhf_jax.algorithms.superhf import superhf
from tests.algorithms import loops
from tests.algorithms.loops import GROUP, Wanted, batch, ours


def best_rows(rows, size):
    """The first of the largest rewards of each group."""
    chosen = []
    for group in loops.grouped([row.reward for row in rows], size):
        best = next(i for i, reward in enumerate(group) if reward == max(group))
        chosen += [i == best for i in range(size)]
    return chosen


def good_rows(rows, size, threshold, most):
    """The first `most` of each group whose reward is above a threshold, and that say something."""
    chosen = []
    for group in loops.grouped(rows, size):
        good = [i for i, row in enumerate(group) if row.reward > threshold and row.old]
        chosen += [i in good[:most] for i in range(size)]
    return chosen


@pytest.mark.parametrize(("threshold", "most"), [(0.5, None), (-1.0, None), (-1.0, 2), (-0.5, 1)])
def test_expert_iteration_against_a_loop(threshold, most):
    experience, output = batch()
    rows = loops.rows_of(experience)
    chosen = good_rows(rows, GROUP, threshold, most)

    def terms(point, still):
        del still
        kept = [
            [-x for x in new] if good else []
            for new, good in zip(point["logprobs"], chosen, strict=True)
        ]
        return {"policy": (1.0, loops.mean_over(kept, "token_mean"))}

    returns = loops.everywhere([row.reward for row in rows], rows)
    wanted = Wanted(loops.everywhere(map(float, chosen), rows), returns, terms, kept=chosen)
    options = dict(threshold=threshold) | (dict(most=most) if most else {})
    found = loops.assert_agrees("expert_iteration", (experience, output), wanted, **options)
    share = found.metrics["policy/imitated"]
    assert (float(share.total), float(share.count)) == (sum(chosen), 11)  # one row is empty
    assert 0 < sum(chosen) < 11


def test_expert_iteration_asks_the_reward_that_it_names():
    """The unweighted scores of one label decide, whatever else the reward says."""
    experience, output = batch()
    verdict = np.array([1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1], np.float32)
    scores = dataclasses.replace(experience.scores, parts={"exact": verdict})
    data = dataclasses.replace(experience, scores=scores), output
    found = ours("expert_iteration", data, reward="exact", most=3)
    trained = np.flatnonzero(np.asarray(found.targets.mask).any(axis=1))
    np.testing.assert_array_equal(trained, [0, 8, 9, 10])  # row 2 is empty; of all right ones three
    with pytest.raises(ValueError, match="expert_iteration: no reward 'exakt'; known: exact"):
        ours("expert_iteration", data, reward="exakt")


def imitation_loop(
    experience, *, beta=0.0, estimator="k2", how="token_mean", size=GROUP, others=True
):
    """−mean log π(y*) + β mean KL: over the best completions, and over all of them.

    With `others` completions that are not chosen train too, as far as the KL goes.
    """
    rows = loops.rows_of(experience)
    chosen = best_rows(rows, size)
    kept = [i for i, best in enumerate(chosen) if best]

    def terms(point, still):
        likelihood, divergence = [], []
        for i in range(len(rows)):
            new, fixed, ref = point["logprobs"][i], still["logprobs"][i], rows[i].ref
            if i in kept:
                likelihood.append([-x for x in new])
            places = zip(new, fixed, ref, strict=True)
            divergence.append([loops.kl(n - r, f - r, estimator) for n, f, r in places])
        found = {"policy": (1.0, loops.mean_over(likelihood, how))}
        return found | ({"kl": (beta, loops.mean_over(divergence, how))} if beta else {})

    returns = loops.everywhere([row.reward for row in rows], rows)
    advantages = loops.everywhere(map(float, chosen), rows)
    return Wanted(advantages, returns, terms, kept=None if others else chosen)


@pytest.mark.parametrize(
    ("name", "options", "loop"),
    [
        ("best_of_n", {}, {"others": False}),
        (
            "best_of_n",
            {"aggregate": "sequence_mean_token_sum"},
            {"how": "sequence_mean_token_sum", "others": False},
        ),
        ("superhf", {}, {"beta": 0.35}),
        (
            "superhf",
            {"kl_coef": 1.5, "kl_estimator": "k3+", "aggregate": "sequence_mean_token_mean"},
            {"beta": 1.5, "estimator": "k3+", "how": "sequence_mean_token_mean"},
        ),
        ("superhf", {"kl_coef": 0}, {}),
    ],
)
def test_against_a_loop(name, options, loop):
    data = batch()
    loops.assert_agrees(name, data, imitation_loop(data[0], **loop), **options)


def test_a_group_of_one_imitates_itself():
    """K = 1, which a build refuses: nothing is selected, all is imitated."""
    data = batch(group=1)
    wanted = imitation_loop(data[0], beta=0.35, size=1)
    assert all(map(all, wanted.advantages))
    loops.assert_agrees("superhf", data, wanted, group=1)


@pytest.mark.parametrize("name", ["best_of_n", "superhf"])
def test_of_equal_samples_the_first_is_imitated(name):
    data = batch(outcome=[0.1, 0.7, 0.7, 0.2] + [0.3] * 4 + [0.0, 0.0, 0.0, 1.0], process=0.0)
    found = ours(name, data, **({"kl_coef": 0} if name == "superhf" else {}))
    trained = np.asarray(found.targets.advantages).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(trained), [1, 4, 11])
    gradient = np.asarray(found.gradient.logprobs)
    np.testing.assert_array_equal((gradient != 0).any(axis=1), trained)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["best_of_n", "superhf", "online_dpo", "expert_iteration"])
def test_a_reward_that_is_not_a_number_is_never_learnt(name):
    """The largest of 1 and NaN is NaN; it must not be the best of its group in silence."""
    data = batch(outcome=[1.0, np.nan, 0.0, 0.0] + [0.0, 1.0, 0.5, 0.2] * 2, process=0.0)
    found = ours(name, data)
    assert not np.isfinite(np.asarray(found.gradient.logprobs)).all()


def test_an_empty_best_sample_leaves_its_group_out():
    """Row 2 has no token: however well it scored, there is nothing to imitate."""
    outcome = np.zeros(12)
    outcome[[2, 5, 8]] = 1.0
    data = batch(outcome=outcome, process=0.0)
    found = ours("best_of_n", data)
    np.testing.assert_array_equal(
        np.flatnonzero(np.asarray(found.targets.mask).any(axis=1)), [5, 8]
    )
    terms = imitation_loop(data[0]).terms
    point = loops.point_of(data[1], data[0].rollouts.mask)
    np.testing.assert_allclose(
        loops.means(found)["policy"][1], terms(point, point)["policy"][1], rtol=1e-6
    )


def test_the_anchor_pulls_towards_the_reference():
    """Descent on the KL term alone raises what the reference says more often, token by token."""
    experience, output = batch()
    held, free = (ours("superhf", (experience, output), kl_coef=c) for c in (0.35, 0.0))
    pull = np.asarray(held.gradient.logprobs) - np.asarray(free.gradient.logprobs)
    kept = np.asarray(held.targets.mask)
    above = np.asarray(output.logprobs) - np.asarray(experience.ref_logprobs)
    np.testing.assert_array_equal(np.sign(pull[kept]), np.sign(above[kept]))
    # At the reference itself there is nothing to hold.
    there = dataclasses.replace(output, logprobs=experience.ref_logprobs)
    assert loops.means(ours("superhf", (experience, there)))["kl"] == (pytest.approx(0.35), 0.0)


def test_needs_and_refusals():
    assert not best_of_n().needs.reference and not best_of_n().needs.value
    assert superhf().needs.reference and not superhf(kl_coef=0).needs.reference
    with pytest.raises(ValueError, match=r"kl_estimator='k1': .* holds nothing; set 'k2'"):
        superhf(kl_estimator="k1")
    with pytest.raises(ValueError, match=r"kl_coef=-1; wanted 0 or more"):
        superhf(kl_coef=-1)
    assert expert_iteration().needs.min_group == 1 and not expert_iteration().needs.reference
    with pytest.raises(ValueError, match="most=0; wanted 1 or more samples"):
        expert_iteration(most=0)
    for factory in (best_of_n, superhf, expert_iteration):
        with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
            factory(aggregate="mean")
        with pytest.raises(ValueError, match="uses no constant, got 5"):
            factory(constant=5)
