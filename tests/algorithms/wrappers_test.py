"""Wrappers around algorithms: weights, masks and selections in literal numbers and by loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.algorithms.wrappers import correction, imitate, omit_truncated, select
from rlhf_jax.find import find, members
from rlhf_jax.types import Scores
from tests.conformance.algorithms_test import GROUP, LENGTHS, PROMPTS, ROWS, make_batch

HOWS = ("tis", "token_mask", "sequence_tis", "sequence_mask")
SHELF = members("algorithms")


def rolled(experience, weight):
    """The experience as if the sampler had said π_old / weight of every token."""
    log_weight = np.broadcast_to(np.log(weight), experience.logprobs.shape)
    behaviour = experience.logprobs - log_weight.astype(np.float32)
    rollouts = dataclasses.replace(experience.rollouts, behaviour_logprobs=behaviour)
    return dataclasses.replace(experience, rollouts=rollouts)


def terms_of(algorithm, experience, output):
    targets, _ = algorithm.targets(experience, GROUP, algorithm.init())
    terms, metrics = algorithm.loss(output, experience, targets, GROUP)
    return targets, {name: (t.mean.total, t.mean.count) for name, t in terms.items()}, metrics


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("make", [grpo, ppo])
def test_equal_policies_leave_the_loss_as_it_is(how, make):
    experience, output = make_batch(make(), padding=np.nan)
    wrapped = terms_of(correction(make(), how=how), experience, output)
    assert_same(terms_of(make(), experience, output)[:2], wrapped[:2])
    assert float(wrapped[2]["policy/corrected"].total) == 0.0


@pytest.mark.parametrize("make", [grpo, ppo])
def test_a_weight_of_ten_held_at_two_doubles_the_policy_term_alone(make):
    experience, output = make_batch(make(), padding=np.nan)
    algorithm = make(entropy_coef=0.1) if make is ppo else make(kl_coef=0.1)
    _, base, _ = terms_of(algorithm, experience, output)
    wrapped = correction(algorithm, how="tis", high=2.0)
    _, found, metrics = terms_of(wrapped, rolled(experience, 10.0), output)
    for name, (total, count) in base.items():
        factor = 2.0 if name == "policy" else 1.0
        np.testing.assert_allclose(found[name][0], factor * total, rtol=1e-6)
        np.testing.assert_array_equal(found[name][1], count)
    share = metrics["policy/corrected"]
    assert float(share.total) == float(share.count) == sum(LENGTHS)


def test_weights_below_the_bound_pass_and_masks_take_out():
    experience, output = make_batch(grpo())
    targets, base, _ = terms_of(grpo(kl_coef=0.0), experience, output)
    _, tis, _ = terms_of(correction(grpo(kl_coef=0.0), how="tis"), rolled(experience, 0.25), output)
    np.testing.assert_allclose(tis["policy"][0], 0.25 * base["policy"][0], rtol=1e-5)
    # Every other token is far off: it weighs nothing, and the divisor stays.
    weight = np.where(np.arange(targets.mask.shape[1]) % 2, 5.0, 1.5)
    wrapped = correction(grpo(kl_coef=0.0), how="token_mask")
    masked, found, metrics = terms_of(wrapped, rolled(experience, weight), output)
    wanted = np.where(weight == 1.5, 1.5, 0.0) * np.asarray(targets.advantages)
    np.testing.assert_allclose(masked.advantages, wanted, rtol=1e-5)
    np.testing.assert_array_equal(found["policy"][1], base["policy"][1])
    np.testing.assert_array_equal(masked.mask, targets.mask)
    odd = float(np.asarray(targets.mask)[:, 1::2].sum())
    assert float(metrics["policy/corrected"].total) == odd


@pytest.mark.parametrize("how", ["sequence_tis", "sequence_mask"])
def test_a_completion_is_weighed_as_a_whole(how):
    experience, output = make_batch(grpo())
    mask = np.asarray(experience.rollouts.mask)
    one = np.ones(mask.shape)
    one[0, 0], one[0, 1] = 4.0, 0.5  # 2 in all: inside both bounds
    one[3, 0] = 8.0
    targets, _, _ = terms_of(grpo(), experience, output)
    found, _, metrics = terms_of(correction(grpo(), how=how), rolled(experience, one), output)
    weight = np.ones(ROWS)
    weight[0], weight[3] = 2.0, 2.0 if how == "sequence_tis" else 0.0
    wanted = weight[:, None] * np.asarray(targets.advantages)
    np.testing.assert_allclose(found.advantages, wanted, rtol=1e-5, atol=1e-7)
    assert float(metrics["policy/corrected"].total) == LENGTHS[3]


@pytest.mark.parametrize("how", HOWS)
def test_no_gradient_flows_into_the_weight(how):
    experience, output = make_batch(grpo())
    algorithm = correction(grpo(), how=how)

    def total(logprobs, behaviour):
        rollouts = dataclasses.replace(experience.rollouts, behaviour_logprobs=behaviour)
        moved = dataclasses.replace(experience, rollouts=rollouts)
        # The surrogate's own ratio is held where it was: only the weight could carry a slope.
        changed = dataclasses.replace(moved, logprobs=logprobs)
        targets, _ = algorithm.targets(changed, GROUP, ())
        return algorithm.loss(output, moved, targets, GROUP)[0]["policy"].mean.total

    behaviour = experience.logprobs - 0.3
    slopes = jax.grad(total, argnums=(0, 1))(experience.logprobs, behaviour)
    assert_same(slopes, jax.tree.map(jnp.zeros_like, slopes))
    assert float(total(experience.logprobs, behaviour)) != float(
        total(experience.logprobs - 0.2, behaviour)
    )


@pytest.mark.parametrize(
    "lengths", [(1,) * ROWS, (0,) * ROWS, LENGTHS], ids=["one", "none", "many"]
)
@pytest.mark.parametrize("how", HOWS)
def test_hard_batches_stay_finite(lengths, how):
    equal = (0.3,) * ROWS  # all rewards equal: no group has an advantage
    experience, output = make_batch(grpo(), padding=np.nan, lengths=lengths, outcome=equal)
    zero = jnp.where(experience.rollouts.mask, 0.0, jnp.nan)
    scores = Scores(outcome=experience.scores.outcome, process=zero, parts={})
    experience = dataclasses.replace(rolled(experience, 1e30), scores=scores)
    targets, terms, _ = terms_of(correction(grpo(), how=how), experience, output)
    np.testing.assert_array_equal(targets.advantages, 0)
    assert np.isfinite(terms["policy"][0]) and np.isfinite(terms["kl"][0])


def test_truncated_rows_train_nothing_and_stay_in_the_baseline():
    experience, output = make_batch(ppo())
    cut = np.arange(ROWS) % 3 == 0
    rollouts = dataclasses.replace(experience.rollouts, truncated=jnp.asarray(cut))
    experience = dataclasses.replace(experience, rollouts=rollouts)
    for make in (grpo, ppo):
        before, _, _ = terms_of(make(), experience, output)
        wrapped = omit_truncated(make())
        after, _, _ = terms_of(wrapped, experience, output)
        np.testing.assert_array_equal(after.mask, np.asarray(before.mask) & ~cut[:, None])
        np.testing.assert_array_equal(after.advantages, before.advantages)

        def total(out, algorithm=wrapped, targets=after):
            terms, _ = algorithm.loss(out, experience, targets, GROUP)
            return sum(term.mean.total for term in terms.values())

        slope = np.asarray(jax.grad(total)(output).logprobs)
        assert (slope[cut] == 0).all() and (slope[~cut] != 0).any()


def with_parts(experience, part):
    scores = dataclasses.replace(
        experience.scores,
        process=jnp.zeros(experience.scores.process.shape),
        parts={"exact": jnp.asarray(part, jnp.float32)},
    )
    return dataclasses.replace(experience, scores=scores)


def test_signal_against_a_loop():
    outcome = [0.3, 0.3, 1.0, 0.0, 0.1, 0.1, -2.0, -2.0, 5.0, 5.5, float("nan"), 0.0]
    experience, _ = make_batch(grpo(), outcome=outcome)
    scores = with_parts(experience, [1, 0] * PROMPTS).scores
    wanted = []
    for i in range(PROMPTS):
        first, second = outcome[GROUP * i : GROUP * i + GROUP]
        wanted.append(first != second)  # what is not a number must reach the update
    chosen = select(grpo(), how="signal").select
    np.testing.assert_array_equal(chosen(scores, GROUP), wanted)
    assert wanted == [False, True, False, False, True, True]
    np.testing.assert_array_equal(
        select(grpo(), how="signal", reward="exact").select(scores, GROUP), 1
    )
    alone = [x != x for x in outcome]  # K = 1: equal to itself
    np.testing.assert_array_equal(chosen(scores, 1), alone)


@pytest.mark.parametrize("samples", [1, 10])
@pytest.mark.parametrize(("low", "high"), [(2, 8), (0, 9), (7, 7), (0, 0)])
def test_a_range_holds_its_limits(samples, low, high):
    """Groups with 0 to K right answers; limits in tenths, so that wanted is in whole numbers."""
    part = np.tri(samples + 1, samples, -1, dtype=np.float32).reshape(-1)
    zeros = np.zeros((part.size, 2), np.float32)
    scores = Scores(outcome=zeros[:, 0], process=zeros, parts={"exact": part})
    chosen = select(grpo(), how="range", reward="exact", low=low / 10, high=high / 10).select
    kept = jax.jit(lambda given: chosen(given, samples))(scores)
    wanted = [low * samples <= 10 * right <= high * samples for right in range(samples + 1)]
    assert kept.tolist() == wanted


def test_groups_left_out_have_empty_masks_and_no_gradient():
    outcome = np.tile([1.0, 0.0], PROMPTS)
    outcome[2:4] = 1.0
    experience, output = make_batch(grpo(), outcome=outcome)
    experience = with_parts(experience, outcome)
    for make in (grpo, ppo):
        algorithm = select(make(), how="signal")
        targets, _, _ = terms_of(algorithm, experience, output)
        left_out = np.arange(ROWS) // GROUP == 1
        wanted = np.asarray(experience.rollouts.mask) & ~left_out[:, None]
        np.testing.assert_array_equal(targets.mask, wanted)

        def total(out, algorithm=algorithm, targets=targets):
            terms, _ = algorithm.loss(out, experience, targets, GROUP)
            return sum(term.mean.total for term in terms.values())

        slope = jax.grad(total)(output)
        assert (np.asarray(slope.logprobs)[left_out] == 0).all()
        assert (np.asarray(slope.scores["value"])[left_out] == 0).all()


def test_an_algorithm_that_selects_by_itself_goes_on_doing_so():
    first = grpo()._replace(select=lambda scores, group_size: jnp.arange(PROMPTS) < 3)
    outcome = np.tile([1.0, 0.0], PROMPTS)
    outcome[:2] = 0.0
    experience, _ = make_batch(grpo(), outcome=outcome)
    scores = with_parts(experience, outcome).scores
    kept = select(first, how="signal").select(scores, GROUP)
    assert kept.tolist() == [False, True, True, False, False, False]


def test_wrappers_around_wrappers():
    """All three: the mask of each, the weight, and one state of the algorithm inside."""
    outcome = np.tile([1.0, 0.0], PROMPTS)
    outcome[:2] = 0.0
    experience, output = make_batch(grpo(), outcome=outcome)
    experience = with_parts(rolled(experience, 10.0), outcome)
    cut = jnp.arange(ROWS) == ROWS - 1
    rollouts = dataclasses.replace(experience.rollouts, truncated=cut)
    experience = dataclasses.replace(experience, rollouts=rollouts)
    plain, _, _ = terms_of(grpo(), experience, output)
    wrapped = select(omit_truncated(correction(grpo(), how="tis")), how="signal", reward="exact")
    targets, terms, metrics = terms_of(wrapped, experience, output)
    out = np.isin(np.arange(ROWS), [0, 1, ROWS - 1])
    np.testing.assert_array_equal(targets.mask, np.asarray(plain.mask) & ~out[:, None])
    np.testing.assert_allclose(targets.advantages, 2 * plain.advantages, rtol=1e-6)
    assert set(terms) == {"policy", "kl"} and "policy/corrected" in metrics
    assert wrapped.needs == grpo().needs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(how="signals"), "known: signal, range"),
        (dict(how="signal", low=0.1), "'signal' has no limits"),
        (dict(how="range", reward="exact", low=0.2), "got reward='exact', low=0.2 and high=None"),
        (dict(how="range", low=0.2, high=0.8), "needs reward"),
        (dict(how="range", reward="exact", low=0.8, high=0.2), "wanted low <= high"),
    ],
)
def test_impossible_selections_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        select(grpo(), **values)


def test_a_part_that_nobody_says_is_named():
    experience, _ = make_batch(grpo())
    with pytest.raises(ValueError, match=r"no reward 'exact'; known: a"):
        select(grpo(), how="signal", reward="exact").select(experience.scores, GROUP)


def shelf_member(name, key, make):
    """A member that takes the wrapper `key`, its batch, and what its plain loss has for terms."""
    algorithm = find("algorithms", name)()
    if key not in algorithm.wraps:
        pytest.skip(f"{name} does not take {key}")
    experience, output = make_batch(algorithm)
    cut = np.arange(ROWS) % 3 == 0
    rollouts = dataclasses.replace(experience.rollouts, truncated=jnp.asarray(cut))
    experience = dataclasses.replace(experience, rollouts=rollouts)
    _, terms, _ = terms_of(algorithm, experience, output)
    if "policy" not in terms:  # nothing goes wrong in silence
        with pytest.raises(ValueError, match=f"algorithm.{key} changes the term 'policy'"):
            terms_of(make(algorithm), experience, output)
        pytest.skip(f"{name} is refused when it is traced")
    return algorithm, experience, output, cut


@pytest.mark.parametrize("name", SHELF)
def test_a_member_is_proportional_to_advantages_where_it_takes_a_correction(name):
    """Else a correction would change it as nobody says, or not at all."""
    key, make = "correction", functools.partial(correction, how="tis")
    algorithm, experience, output, _ = shelf_member(name, key, make)
    targets, _ = algorithm.targets(experience, GROUP, algorithm.init())

    def policy(factor):
        scaled = dataclasses.replace(targets, advantages=factor * targets.advantages)
        terms, _ = algorithm.loss(output, experience, scaled, GROUP)
        return terms["policy"].mean.total

    np.testing.assert_allclose(policy(3.0), 3 * policy(1.0), rtol=1e-5)
    assert float(policy(1.0)) != 0.0


@pytest.mark.parametrize("name", SHELF)
def test_rows_of_a_member_are_on_their_own_where_it_takes_omission(name):
    """What is left of the gradient is what it was, for every row that still trains."""
    algorithm, experience, output, cut = shelf_member(name, "omit_truncated", omit_truncated)

    def slope(algorithm):
        targets, _ = algorithm.targets(experience, GROUP, algorithm.init())

        def total(out):
            terms, _ = algorithm.loss(out, experience, targets, GROUP)
            return sum(term.weight * term.mean.total for term in terms.values())

        return np.asarray(jax.grad(total)(output).logprobs)

    whole, rest = slope(algorithm), slope(omit_truncated(algorithm))
    np.testing.assert_array_equal(rest[cut], 0)
    np.testing.assert_allclose(rest[~cut], whole[~cut], rtol=1e-6, atol=1e-7)


# Imitation of right completions


def scored(experience, scores):
    parts = {"exact": jnp.asarray(scores, jnp.float32)}
    return dataclasses.replace(
        experience, scores=dataclasses.replace(experience.scores, parts=parts)
    )


RIGHT = np.array([1.0, 0.5, 1.0, 0.0, 0.9, 0.2] * 2)[:ROWS]  # the third row has no token


@pytest.mark.parametrize("make", [grpo, ppo])
def test_right_completions_are_imitated_as_in_a_loop(make):
    """μ times the mean of −log π over the tokens of what scored above, its gradient as well; the
    other terms are the algorithm's own."""
    experience, output = make_batch(make(), padding=np.nan)
    experience = scored(experience, RIGHT)
    plain, wrapped = make(), imitate(make(), reward="exact", above=0.5, weight=0.1)
    targets, base, _ = terms_of(plain, experience, output)
    _, found, metrics = terms_of(wrapped, experience, output)
    right = [i for i in range(ROWS) if RIGHT[i] > 0.5]
    tokens = [float(output.logprobs[i, t]) for i in right for t in range(LENGTHS[i])]
    np.testing.assert_allclose(found["imitate"], (-sum(tokens), len(tokens)), rtol=1e-5)
    assert_same(base, {name: found[name] for name in base})
    share = metrics["policy/imitated"]
    with_tokens = [i for i in right if LENGTHS[i]]
    assert 0 < len(with_tokens) < len(right)
    assert (float(share.total), float(share.count)) == (len(with_tokens), ROWS)

    def term(logprobs):
        moved = dataclasses.replace(output, logprobs=logprobs)
        one = wrapped.loss(moved, experience, targets, GROUP)[0]["imitate"]
        return one.weight * one.mean.total / one.mean.count

    gradient = np.asarray(jax.grad(term)(output.logprobs))
    wanted = np.zeros(gradient.shape)
    for i in right:
        wanted[i, : LENGTHS[i]] = -0.1 / len(tokens)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def test_without_a_right_completion_nothing_is_imitated():
    experience, output = make_batch(grpo(), padding=np.nan)
    wrapped = imitate(grpo(), reward="exact", above=1.0, weight=0.1)
    _, found, metrics = terms_of(wrapped, scored(experience, RIGHT), output)
    assert [float(x) for x in found["imitate"]] == [0.0, 0.0]
    assert float(metrics["policy/imitated"].total) == 0.0


def test_what_is_left_out_is_not_imitated_either():
    experience, output = make_batch(grpo(), padding=np.nan)
    cut = jnp.arange(ROWS) == 0
    rollouts = dataclasses.replace(experience.rollouts, truncated=cut)
    experience = scored(dataclasses.replace(experience, rollouts=rollouts), RIGHT)
    values = dict(reward="exact", above=0.5, weight=0.1)
    _, every, all_rows = terms_of(imitate(grpo(), **values), experience, output)
    _, ended, some = terms_of(imitate(omit_truncated(grpo()), **values), experience, output)
    assert float(every["imitate"][1] - ended["imitate"][1]) == LENGTHS[0]
    assert float(all_rows["policy/imitated"].total - some["policy/imitated"].total) == 1.0


def test_a_score_that_is_not_a_number_is_not_passed_over():
    experience, output = make_batch(grpo(), padding=np.nan)
    spoilt = np.where(np.arange(ROWS) == 1, np.nan, RIGHT)
    wrapped = imitate(grpo(), reward="exact", above=0.5, weight=0.1)
    _, found, _ = terms_of(wrapped, scored(experience, spoilt), output)
    assert np.isnan(found["imitate"][0])


def test_an_imitation_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"weight=0; wanted more than 0, such as 0.1, or leave"):
        imitate(grpo(), reward="exact", above=0.5, weight=0)
    experience, output = make_batch(grpo())
    with pytest.raises(ValueError, match="imitate: no reward 'exact'; known: a"):
        terms_of(imitate(grpo(), reward="exact", above=0.5, weight=0.1), experience, output)
    twice = imitate(
        imitate(grpo(), reward="a", above=0.5, weight=0.1), reward="a", above=0, weight=1
    )
    with pytest.raises(ValueError, match="a term 'imitate' already"):
        terms_of(twice, experience, output)
