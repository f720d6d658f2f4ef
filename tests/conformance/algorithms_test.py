"""What every algorithm must do, run over every member of the shelf (defaults, small batch)."""

import dataclasses
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.find import find, members
from rlhf_jax.ops.groups import split_chunks
from rlhf_jax.types import CompletionOutput, Experience, Prompts, Rollouts, Scores, Texts

LENGTHS = (3, 1, 0, 2, 5, 4, 1, 5, 2, 3, 5, 1)  # one row is empty, three are of length 1
LENGTH, WIDTH, GROUP = 5, 2, 2
ROWS, PROMPTS = len(LENGTHS), len(LENGTHS) // GROUP


README = pathlib.Path(__file__).parents[2] / "README.md"


def in_readme():
    """The example of README's "Add an algorithm", which is held to the same."""
    section = README.read_text(encoding="utf-8").partition("## Add an algorithm")[2]
    names = {}
    exec(section.partition("```python")[2].partition("```")[0], names)
    return names["foo"]()


@pytest.fixture(params=[*members("algorithms"), "the example in README"])
def algorithm(request):
    shelf = request.param in members("algorithms")
    return find("algorithms", request.param)() if shelf else in_readme()


def make_batch(algorithm, *, padding=0.0, lengths=LENGTHS, outcome=None):
    """An experience, the output of a policy that has moved, and `padding` wherever there is
    padding."""
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH)[None, :] < np.array(lengths)[:, None]

    def floats(scale=1.0):
        x = scale * rng.normal(size=mask.shape)
        return jnp.asarray(np.where(mask, x, padding), jnp.float32)

    def ints(n):
        return jnp.arange(n, dtype=jnp.int32)

    prompts = Prompts(
        tokens=jnp.ones((PROMPTS, 3), jnp.int32),
        mask=jnp.ones((PROMPTS, 3), bool),
        record=ints(PROMPTS),
        source=ints(PROMPTS),
        draw=ints(PROMPTS),
    )
    old = floats() - 2
    rollouts = Rollouts(
        prompts=prompts,
        tokens=jnp.where(jnp.asarray(mask), 2, 0),
        mask=jnp.asarray(mask),
        step_ends=jnp.asarray(mask & (rng.random(mask.shape) < 0.5)),
        logprobs=old,
        behaviour_logprobs=old,
        truncated=jnp.zeros(ROWS, bool),
        sample=ints(ROWS) % GROUP,
        version=jnp.zeros(ROWS, jnp.int32),
    )
    drawn = rng.normal(size=ROWS)
    outcome = jnp.asarray(drawn if outcome is None else outcome, jnp.float32)
    texts, extra = {}, {}
    for name in algorithm.needs.extra:
        ones = jnp.ones((ROWS, LENGTH), jnp.int32)
        texts[name] = Texts(tokens=ones, mask=ones > 0, loss_mask=ones > 0, segment=ones)
        extra[name] = jnp.asarray(-rng.random((ROWS, LENGTH)), jnp.float32)
    experience = Experience(
        rollouts=rollouts,
        scores=Scores(outcome=outcome, process=floats(0.3), parts={"a": outcome}),
        logprobs=old,
        ref_logprobs=old + floats(0.3),
        values=floats(),
        extra=texts,
    )
    output = CompletionOutput(
        logprobs=old + floats(0.4),
        entropy=jnp.abs(floats()),
        scores={"value": floats()},
        extra=extra,
    )
    return experience, output


def total_loss(algorithm, experience, output, targets, totals=None):
    """Σ weight · total / count, as the update step adds it up; `totals`: counts to divide by."""
    terms, _ = algorithm.loss(output, experience, targets, GROUP)
    counts = totals or {name: term.mean.count for name, term in terms.items()}
    return sum(t.weight * t.mean.total / jnp.maximum(counts[n], 1) for n, t in terms.items())


def run(algorithm, experience, output):
    """Targets, loss and its gradient with respect to the output."""
    targets, _ = algorithm.targets(experience, GROUP, algorithm.init())
    value, gradient = jax.value_and_grad(
        lambda out: total_loss(algorithm, experience, out, targets)
    )(output)
    return targets, value, gradient


def assert_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, **tolerance)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.all(np.isfinite(leaf))


def test_shapes_types_and_a_gradient(algorithm):
    experience, output = make_batch(algorithm)
    state = algorithm.init()
    targets, after = algorithm.targets(experience, GROUP, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert targets.advantages.shape == targets.returns.shape == targets.mask.shape
    assert targets.advantages.dtype == targets.returns.dtype == jnp.float32
    _, value, gradient = run(algorithm, experience, output)
    assert_finite((targets, value, gradient))
    assert np.any(np.asarray(gradient.logprobs) != 0)
    np.testing.assert_array_equal(np.asarray(gradient.logprobs)[~np.asarray(targets.mask)], 0)


def test_the_same_under_jit(algorithm):
    experience, output = make_batch(algorithm)
    plain = run(algorithm, experience, output)
    compiled = jax.jit(lambda e, o: run(algorithm, e, o))(experience, output)
    assert_close(plain, compiled, rtol=1e-5, atol=1e-6)


def test_nan_in_padding_changes_nothing(algorithm):
    clean = run(algorithm, *make_batch(algorithm))
    experience, output = make_batch(algorithm, padding=np.nan)
    assert np.isnan(experience.values).any() and np.isnan(output.logprobs).any()
    dirty = run(algorithm, experience, output)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
    _, metrics = algorithm.loss(output, experience, dirty[0], GROUP)
    assert_finite(metrics)


def test_counts_depend_on_neither_output_nor_parameters(algorithm):
    experience, output = make_batch(algorithm)
    targets, _ = algorithm.targets(experience, GROUP, algorithm.init())
    zeros = jax.tree.map(jnp.zeros_like, output)
    counts = [
        {name: float(term.mean.count) for name, term in terms.items()}
        for terms, _ in (algorithm.loss(o, experience, targets, GROUP) for o in (output, zeros))
    ]
    assert counts[0] == counts[1] and all(count > 0 for count in counts[0].values())

    def total_count(out):
        terms, _ = algorithm.loss(out, experience, targets, GROUP)
        return sum(term.mean.count for term in terms.values())

    for leaf in jax.tree.leaves(jax.grad(total_count)(output)):
        np.testing.assert_array_equal(leaf, 0)


def test_gradients_flow_only_through_output(algorithm):
    experience, output = make_batch(algorithm)
    targets, _ = algorithm.targets(experience, GROUP, algorithm.init())

    def loss_of(frozen):
        return total_loss(algorithm, frozen[0], output, frozen[1])

    gradient = jax.grad(loss_of, allow_int=True)((experience, targets))
    for leaf in jax.tree.leaves(gradient):
        if leaf.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(leaf, 0)


def test_shuffling_groups_shuffles_targets_and_keeps_the_loss(algorithm):
    experience, output = make_batch(algorithm)
    order = np.random.default_rng(1).permutation(PROMPTS)
    rows = (order[:, None] * GROUP + np.arange(GROUP)).reshape(-1)

    def shuffle(tree):
        return jax.tree.map(lambda x: x[rows] if x.shape[0] == ROWS else x[order], tree)

    targets, value, gradient = run(algorithm, experience, output)
    moved = run(algorithm, shuffle(experience), shuffle(output))
    wanted = (shuffle(targets), value, shuffle(gradient))
    assert_close(wanted, moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_microbatches_sum_to_the_batch(algorithm, chunks):
    experience, output = make_batch(algorithm)
    targets, whole, gradient = run(algorithm, experience, output)
    terms, metrics = algorithm.loss(output, experience, targets, GROUP)
    totals = {name: term.mean.count for name, term in terms.items()}
    per_prompt, rollouts = experience.rollouts.prompts, experience.rollouts

    def split(tree, group=GROUP):
        return split_chunks(tree, chunks, group)

    def part(j):  # prompts have one row per group and must be split as such
        def take(tree):
            return jax.tree.map(lambda x: x[j], tree)

        prompts = take(split(per_prompt, 1))
        rest = {n: v for n, v in vars(rollouts).items() if n != "prompts"}
        rest_of = {n: v for n, v in vars(experience).items() if n != "rollouts"}
        return (
            Experience(
                rollouts=Rollouts(prompts=prompts, **take(split(rest))), **take(split(rest_of))
            ),
            take(split(output)),
            take(split(targets)),
        )

    loss, gradients, added = 0.0, [], {name: 0.0 for name in metrics}
    for j in range(chunks):
        some_experience, some_output, some_targets = part(j)
        value, some_gradient = jax.value_and_grad(
            lambda out, e=some_experience, t=some_targets: total_loss(algorithm, e, out, t, totals)
        )(some_output)
        loss += value
        gradients.append(some_gradient)
        _, some_metrics = algorithm.loss(some_output, some_experience, some_targets, GROUP)
        for name, mean in some_metrics.items():
            added[name] += float(mean.total)
    np.testing.assert_allclose(loss, whole, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    assert_close(stacked, split(gradient), rtol=1e-5, atol=1e-7)
    for name, mean in metrics.items():
        assert added[name] == pytest.approx(float(mean.total), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("lengths", "outcome"),
    [
        ((1,) * ROWS, None),
        ((0,) * ROWS, None),
        (LENGTHS, (0.3,) * ROWS),
        ((0, 0) + (5,) * (ROWS - 2), (1e6,) * 6 + (-1e6,) * 6),
    ],
    ids=["length 1", "nothing valid", "equal rewards", "huge rewards"],
)
def test_hard_batches_are_finite(algorithm, lengths, outcome):
    experience, output = make_batch(algorithm, padding=np.nan, lengths=lengths, outcome=outcome)
    targets, value, gradient = run(algorithm, experience, output)
    assert_finite((targets, value, gradient))
    if not any(lengths):
        assert not np.any(np.asarray(gradient.logprobs))


def test_a_score_that_is_not_a_number_reaches_the_loss(algorithm):
    """So that the update is skipped and counted: comparing takes NaN for the largest score."""
    outcome = np.linspace(0.0, 1.0, ROWS)
    outcome[4] = np.nan
    experience, output = make_batch(algorithm, outcome=outcome)
    _, value, gradient = run(algorithm, experience, output)
    assert not np.isfinite(value) or not np.all(np.isfinite(gradient.logprobs))


def test_fractions_of_scores_are_kept(algorithm):
    """A peer truncated learned scores to whole numbers: 0.3 and 0.6 were the same to it."""
    outcome = np.tile([0.3, 0.6], PROMPTS)
    lengths = (3,) * ROWS
    experience, output = make_batch(algorithm, lengths=lengths, outcome=outcome)
    flat = dataclasses.replace(
        experience,
        scores=Scores(outcome=jnp.zeros(ROWS), process=experience.scores.process, parts={}),
    )
    found, _, gradient = run(algorithm, experience, output)
    other, _, flat_gradient = run(algorithm, flat, output)
    assert not np.allclose(found.returns, other.returns, atol=0.1)
    largest = np.abs(gradient.logprobs).max()  # constants in the loss scale all of them
    assert not np.allclose(gradient.logprobs, flat_gradient.logprobs, rtol=0, atol=0.01 * largest)


def test_needs_are_what_targets_and_loss_read(algorithm):
    """Passes that were not asked for hold zeros: whatever stands there must not matter."""
    experience, output = make_batch(algorithm)
    changes = {}
    if not algorithm.needs.value:
        changes["values"] = experience.values + 100
    if not algorithm.needs.reference:
        changes["ref_logprobs"] = experience.ref_logprobs - 3
    wanted = run(algorithm, experience, output)
    found = run(algorithm, dataclasses.replace(experience, **changes), output)
    assert_close(wanted, found, rtol=0, atol=0)
    assert algorithm.needs.min_group <= GROUP


DRIVEN = [
    (name, options)
    for name in members("algorithms")
    if "kl_coef" in (parameters := inspect.signature(find("algorithms", name)).parameters)
    for options in (
        ({}, {"kl_place": "loss", "kl_estimator": "k2"}) if "kl_place" in parameters else ({},)
    )
]


@pytest.mark.parametrize(("name", "options"), DRIVEN, ids=str)
def test_a_driven_kl_coef_is_the_configured_one(name, options):
    """β from the experience gives what the same β in the config gives; of no KL term, nothing."""
    factory = find("algorithms", name)
    algorithm, wanted = (factory(kl_coef=beta, **options) for beta in (0.25, 0.5))
    assert algorithm.kl_coef.start == 0.25 and factory(kl_coef=0.0).kl_coef is None
    experience, output = make_batch(algorithm, padding=np.nan)
    other = dataclasses.replace(experience, kl_coef=jnp.float32(0.5))
    expected, found = run(wanted, experience, output), run(algorithm, other, output)
    assert_close(expected, found, rtol=1e-6, atol=1e-7)
    assert not np.allclose(run(algorithm, experience, output)[1], found[1], rtol=1e-3, atol=0)
