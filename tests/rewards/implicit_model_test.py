"""Log-ratios as rewards, and how their model learns: against loops, on a tiny model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.mesh import make_mesh
from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import decoder
from rlhf_jax.rewards.base import lend_base
from rlhf_jax.rewards.implicit_model import implicit_model
from rlhf_jax.training.online import make_learner
from rlhf_jax.types import Scores, Texts
from tests.training.tiny import (
    RULES,
    assert_close,
    assert_equal,
    config,
    init,
    largest_change,
    one_device,
    rollouts,
)

BETA, RATE = 0.5, 0.1


@functools.cache
def batch():
    given = rollouts(2, 2, seed=3)
    last = np.cumsum(given.mask, 1) == given.mask.sum(1, keepdims=True)
    ends = (given.step_ends | last) & given.mask
    return dataclasses.replace(given, step_ends=ends)


def scores(right):
    part = np.asarray(right, np.float32)
    return Scores(outcome=part, process=np.zeros(batch().mask.shape, np.float32),
                  parts={"exact": part})  # fmt: skip


def trees(mesh=None):
    """The model, what it became and what it was."""
    model = decoder(config(layers=1), RULES)
    return model, *(init(model, seed, mesh or one_device()) for seed in (0, 7))


def logprobs(*asked):
    """log π of each token of each completion for each tree, from texts without padding before."""
    model, given = trees()[0], batch()
    prompts, rows = given.prompts, []
    for i, (tokens, mask) in enumerate(zip(given.tokens, given.mask, strict=True)):
        n = i // given.group_size
        prompt = np.asarray(prompts.tokens)[n][np.asarray(prompts.mask)[n]]
        rows.append((len(prompt), [*prompt, *np.asarray(tokens)[np.asarray(mask)]]))
    width = max(len(row) for _, row in rows)
    mask = np.arange(width) < np.array([len(row) for _, row in rows])[:, None]
    tokens = np.array([row + [0] * (width - len(row)) for _, row in rows], np.int32)
    texts = Texts(tokens=tokens, mask=mask, loss_mask=mask, segment=mask.astype(np.int32))
    said = jax.jit(lambda tree: evaluate_texts(model, tree, {}, texts).logprobs)
    found = [np.asarray(said(tree)) for tree in asked]
    return [[x[i, start : len(row)] for i, (start, row) in enumerate(rows)] for x in found]


def learning(model, params, reference=None, *, mesh=None, rows=None):
    learner = make_learner(optax.sgd(RATE), model, mesh or one_device())
    return implicit_model(
        model=model, params=params, reference=reference, learner=learner, rows=rows, beta=BETA,
        label="exact", threshold=0.4,
    )  # fmt: skip


@functools.cache
def whole():
    """A reward that learns, and its compiled programs: parameters are state."""
    reward = learning(*trees())
    return reward, jax.jit(reward.score), jax.jit(reward.update)


def one_step(update, state, right, mesh=None):
    """(state after, metrics) of one update on the batch."""
    with jax.set_mesh(mesh or one_device()):
        after, found = update(state, batch(), scores(right), jax.random.key(0))
    return after, {n: float(m.total) / max(float(m.count), 1) for n, m in found.items()}


def totals_of(score, state):
    return np.asarray(score(state, batch())[0].parts["implicit_model"])


def test_scores_are_log_ratios_of_tokens_and_of_steps():
    model, params, start = trees()
    both = zip(*logprobs(params, start), strict=True)
    differences = [BETA * (ours - theirs) for ours, theirs in both]
    by_token, by_step = np.zeros((2, *batch().mask.shape))
    for i, row in enumerate(differences):
        by_token[i, : len(row)] = row
        since = 0.0
        for t, reward in enumerate(row):
            since += reward
            if batch().step_ends[i, t]:
                by_step[i, t], since = since, 0.0
    steps = implicit_model(model=model, params=params, reference=start, beta=BETA, per="step")
    for score, state, wanted in (
        (whole()[1], whole()[0].init(), by_token),
        (jax.jit(steps.score), steps.init(), by_step),
    ):
        found, _ = score(state, batch())
        np.testing.assert_allclose(found.process, wanted, atol=2e-6)
        np.testing.assert_array_equal(found.outcome, 0)
        total = [row.sum() for row in differences]  # β (log π_ψ(y) − log π_ref(y))
        np.testing.assert_allclose(found.parts["implicit_model"], total, atol=5e-6)


RIGHT = (0.5, 0.4, 1.0, 0.0)  # above 0.4: the first and the third


def test_a_step_follows_the_labels():
    """L is the mean cross-entropy of Σ r_t; right completions rise, wrong ones fall."""
    _, params, start = trees()
    reward, score, update = whole()
    before = reward.init()
    after, found = one_step(update, before, RIGHT)
    totals, moved = totals_of(score, before), totals_of(score, after)
    z = np.array([1, 0, 1, 0])
    loss = np.mean(np.log1p(np.exp(np.where(z, -totals, totals))))
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(found["reward_right"], totals[z == 1].mean(), rtol=1e-4)
    np.testing.assert_allclose(found["reward_wrong"], totals[z == 0].mean(), rtol=1e-4)
    assert found["accuracy"] == np.mean((totals > 0) == z) and found["right"] == 0.5
    assert found["skipped"] == 0.0 and found["grad_norm"] > 0
    change = moved - totals
    assert change[z == 1].mean() > 0 > change[z == 0].mean(), change
    assert_equal(after["reference"], start)
    # A model that is its reference gives d L / d R = σ(0) − z: −1/2 for right, +1/2 for wrong.
    after, found = one_step(update, {**before, "reference": params}, RIGHT)
    assert found["loss"] == pytest.approx(np.log(2), rel=1e-6)
    gained = totals_of(score, after)
    assert gained[z == 1].mean() > 0 > gained[z == 0].mean(), gained


def test_a_step_that_is_not_finite_changes_nothing():
    reward, _, update = whole()
    before = reward.init()
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), before["reference"])
    after = {**before, "reference": broken}
    for count in (1.0, 2.0):
        after, found = one_step(update, after, RIGHT)
        assert found["skipped"] == 1.0 and found["skipped_in_row"] == count
    assert_equal(before["params"], after["params"])
    _, found = one_step(update, {**after, "reference": before["reference"]}, RIGHT)
    assert found["skipped"] == found["skipped_in_row"] == 0.0


@pytest.mark.slow
def test_chunks_and_devices_change_nothing():
    reward, _, update = whole()
    after, found = one_step(update, reward.init(), RIGHT)
    mesh = make_mesh({"data": 2, "fsdp": 2})
    spread = learning(*trees(mesh), mesh=mesh, rows=2)
    with jax.set_mesh(mesh):
        state = spread.init()
    parts, again = one_step(jax.jit(spread.update), state, RIGHT, mesh)
    assert_close(after["params"], parts["params"], atol=1e-6)
    assert again.keys() == found.keys()
    for name, value in found.items():
        assert again[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_adapters_learn_on_a_base_that_is_their_reference():
    model = decoder(config(layers=1, lora_rank=2), RULES)
    adapters, base = partition(init(model, 0, one_device()), model.config)
    reward = learning(model, adapters)
    state, score = reward.init(), jax.jit(reward.score)
    assert state["lent_base"] == {} and "reference" not in state
    lent = lend_base(state, base)
    np.testing.assert_array_equal(totals_of(score, lent), 0)  # adapters at zero are no adapters
    after, metrics = one_step(jax.jit(reward.update), lent, RIGHT)
    assert metrics["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert largest_change(after["params"], adapters) > 1e-3
    assert_equal(after["lent_base"], base)
    assert np.abs(totals_of(score, after)).max() > 1e-4


def test_refusals():
    model, params, start = trees()
    headless = decoder(config(lm_head=False, score_heads=("outcome",)), RULES)
    learner = make_learner(optax.sgd(1.0), model, one_device())
    both = dict(params=params, reference=start)
    for options, said in (
        (dict(both, model=headless), "has no LM head"),
        (dict(both, model=model, beta=0.0), "beta=0.0; wanted more than 0"),
        (dict(both, model=model, per="word"), "per='word'; known: token, step"),
        (dict(model=model, params=params), "reference is missing"),
        (dict(both, model=model, label="exact"), "label='exact' says which"),
        (dict(both, model=model, learner=learner), "label='' says which"),
    ):
        with pytest.raises(ValueError, match=said):
            implicit_model(**options)
    reward = learning(model, params, start)
    unknown = dataclasses.replace(scores(RIGHT), parts={"other": scores(RIGHT).outcome})
    with pytest.raises(ValueError, match=r"label='exact' is no reward; rewards: \['other'\]"):
        reward.update(reward.init(), batch(), unknown, jax.random.key(0))
