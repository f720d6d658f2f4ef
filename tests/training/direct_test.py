"""Pairs that train a policy beside its frozen start: the whole step on a tiny model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.mesh import make_mesh, shard_batch
from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import decoder
from rlhf_jax.ops.direct_preference import direct_preference
from rlhf_jax.training.direct import compare
from rlhf_jax.training.supervised import (
    create_supervised_state,
    make_supervised_evaluate,
    make_supervised_step,
)
from rlhf_jax.training.update import compile_update
from tests.training.supervised_test import answers, blank, pairs, stack
from tests.training.tiny import RULES, assert_close, config, host, init, one_device, texts

SOURCES = {"pairs": 2.0, "texts": 0.5}


def given(rows=4):
    """Pairs without a margin, and texts that train beside them."""
    made = pairs(rows)
    still = dataclasses.replace(made, margin=np.zeros_like(made.margin))
    return {"pairs": still, "texts": texts(4, 8, seed=30)}


class Trainer:
    """mixture -> metrics, on a state that is kept; the reference is where it began."""

    def __init__(self, model, sources, mesh=None, optimizer=None, **options):
        self.mesh = mesh or one_device()
        optimizer = optimizer or optax.sgd(0.5)
        tree = init(model, 0, self.mesh)
        trained, base = partition(tree, model.config)
        self.frozen = {"policy": base, "reference": base or tree}
        self.state = create_supervised_state(trained, optimizer, self.mesh)
        step = make_supervised_step(model, sources, optimizer, **options)
        self.step = compile_update(step, self.state, self.mesh)

    def __call__(self, rows):
        with jax.set_mesh(self.mesh):
            rows = shard_batch(self.mesh, RULES, rows)
            self.state, metrics = self.step(self.state, self.frozen, rows, jax.random.key(0))
        assert all(float(m.count) > 0 for m in metrics.values())
        return {name: float(m.total) / float(m.count) for name, m in metrics.items()}


def test_at_the_start_the_loss_is_log_2_bit_for_bit():
    """Both read the same rows in the same chunks; adapters at zero are no adapters.

    Without adapters: `test_microbatches_and_devices_change_nothing` and tests/train_dpo_test.py.
    """
    model = decoder(config(lora_rank=2), RULES)
    train = Trainer(model, SOURCES, microbatches=2, direct=direct_preference())
    before = host(train.frozen)
    first, second = train(given()), train(given())
    assert np.float32(first["loss/pairs"]) == np.log(np.float32(2))
    for name in ("reward_margin", "reward_chosen", "reward_rejected"):
        assert first[f"pairs/{name}"] == 0.0
    assert first["pairs/accuracy"] == 0.5
    assert second["loss/pairs"] < first["loss/pairs"] and second["pairs/accuracy"] > 0.5
    assert second["pairs/reward_margin"] != 0
    jax.tree.map(np.testing.assert_array_equal, before, host(train.frozen))


def test_no_gradient_reaches_the_reference():
    model = decoder(config(), RULES)
    tree = init(model, 0, one_device())
    rows = texts(2, 8)

    def total(params, reference):
        both = compare(model, params, {}, reference, rows)
        return jnp.sum(both.logprobs - 0.5 * both.reference)

    mine, theirs = jax.jit(jax.grad(total, argnums=(0, 1)))(tree, tree)
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(theirs))
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(mine))


def looped(model, params, reference, rows, beta, smoothing):
    """Every metric as (total, count), by Python loops over pairs and tokens."""
    sums = {}

    def count(name, value, present=True):
        total, number = sums.get(name, (0.0, 0.0))
        sums[name] = (total + value, number + 1) if present else (total, number)

    both = []
    for side in (rows.chosen, rows.rejected):
        told = [
            np.float64(evaluate_texts(model, p, {}, side).logprobs) for p in (params, reference)
        ]
        read = []
        for i, tokens in enumerate(side.loss_mask & side.mask):
            where = [t for t in np.flatnonzero(tokens) if t > 0]
            read.append([sum(one[i, t] for t in where) for one in told])
        both.append(read)
    for (c, rc), (r, rr), label, margin in zip(*both, rows.label, rows.margin, strict=True):
        d = beta * ((c - rc) - (r - rr))
        p = label * (1 - smoothing) + (1 - label) * smoothing
        right, wrong = (np.log1p(np.exp(-x)) for x in (d - margin, -d - margin))
        count("loss/pairs", p * right + (1 - p) * wrong)
        count("pairs/accuracy", float((d > 0) == (label > 0.5)), label != 0.5)
        count("pairs/reward_chosen", beta * (c - rc))
        count("pairs/reward_rejected", beta * (r - rr))
        count("pairs/reward_margin", d)
        count("pairs/logprob_chosen", c)
        count("pairs/logprob_rejected", r)
    return sums


def test_evaluation_agrees_with_loops_and_ignores_rows_of_padding():
    model, rows = decoder(config(), RULES), pairs(4)
    params, reference = init(model, 0, one_device()), init(model, 7, one_device())
    direct = direct_preference(beta=0.3, label_smoothing=0.1)
    evaluate = make_supervised_evaluate(model, {"pairs": 1.0}, microbatches=2, direct=direct)
    frozen = {"policy": {}, "reference": reference}
    padded = {"pairs": jax.tree.map(jnp.asarray, stack(rows, blank(rows)))}
    found = jax.jit(evaluate)({"policy": params}, frozen, padded)
    wanted = looped(model, params, reference, rows, 0.3, 0.1)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        got = (float(found[name].total), float(found[name].count))
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5, err_msg=name)


def looped_labels(model, params, reference, rows, beta, smoothing):
    """Every metric of labelled answers as (total, count), by a loop over them."""
    told = [
        np.float64(evaluate_texts(model, p, {}, rows.texts).logprobs) for p in (params, reference)
    ]
    sums = {}
    for i, tokens in enumerate(rows.texts.loss_mask & rows.texts.mask):
        where = [t for t in np.flatnonzero(tokens) if t > 0]
        ours, theirs = (sum(one[i, t] for t in where) for one in told)
        r, right = beta * (ours - theirs), rows.label[i] > 0.5
        z = rows.label[i] * (1 - smoothing) + (1 - rows.label[i]) * smoothing
        loss = z * np.log1p(np.exp(-r)) + (1 - z) * np.log1p(np.exp(r))
        side = "right" if right else "wrong"
        said = {"loss/answers": loss, f"answers/reward_{side}": r, f"answers/logprob_{side}": ours}
        said |= dict.fromkeys(("answers/accuracy", f"answers/accuracy_{side}"), (r > 0) == right)
        for name, value in said.items():
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = (total + value, count + 1)
    return sums


def test_labels_are_the_cross_entropy_of_the_implicit_reward():
    """And rows of padding do not count."""
    model, rows = decoder(config(layers=1), RULES), answers(6)
    params, reference = init(model, 0, one_device()), init(model, 7, one_device())
    direct = direct_preference(beta=0.3, label_smoothing=0.1)
    evaluate = make_supervised_evaluate(model, {"answers": 1.0}, microbatches=2, direct=direct)
    frozen = {"policy": {}, "reference": reference}
    padded = {"answers": jax.tree.map(jnp.asarray, stack(rows, blank(rows)))}
    found = jax.jit(evaluate)({"policy": params}, frozen, padded)
    wanted = looped_labels(model, params, reference, rows, 0.3, 0.1)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        got = (float(found[name].total), float(found[name].count))
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_microbatches_and_devices_change_nothing():
    model, rows = decoder(config(), RULES), given(4)
    direct = direct_preference(loss="ipo", length_coef=0.1, nll_coef=0.5)
    options = dict(optimizer=optax.sgd(0.01), direct=direct)
    whole = Trainer(model, SOURCES, **options)
    split = Trainer(model, SOURCES, make_mesh({"data": 2, "tensor": 2}), microbatches=2, **options)
    metrics, again = whole(rows), split(rows)
    assert metrics["pairs/reward_margin"] == again["pairs/reward_margin"] == 0.0
    terms = (("pairs", 2.0), ("pairs_nll", 1.0), ("texts", 0.5))
    wanted = sum(weight * metrics[f"loss/{name}"] for name, weight in terms)
    assert metrics["update/loss"] == pytest.approx(wanted, rel=1e-6)
    assert again.keys() == metrics.keys()
    for name, value in metrics.items():
        assert again[name] == pytest.approx(value, rel=1e-5, abs=2e-5), name
    assert_close(split.state.params, host(whole.state.params), atol=1e-5)


def test_labels_do_not_follow_a_policy():
    model = decoder(config(), RULES)
    with pytest.raises(ValueError, match=r"smoothing=0\.1: labels follow scores"):
        make_supervised_step(
            model, SOURCES, optax.sgd(0.1), smoothing=0.1, direct=direct_preference()
        )
