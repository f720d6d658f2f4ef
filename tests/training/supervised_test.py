"""Supervised steps: every source normalised by itself, any microbatching, what is learnt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.mesh import make_mesh, shard_batch
from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.transformer import decoder
from rlhf_jax.training.experience import compile_evaluate
from rlhf_jax.training.objective import first_rows
from rlhf_jax.training.supervised import (
    create_supervised_state,
    make_supervised_evaluate,
    make_supervised_step,
)
from rlhf_jax.training.update import compile_update
from rlhf_jax.types import Labelled, Pairs, Steps, Texts
from tests.training.tiny import (
    RULES,
    VOCAB,
    assert_close,
    assert_equal,
    config,
    host,
    init,
    one_device,
    texts,
)

REWARD = config(lm_head=False, score_heads=("outcome", "process"))
SOURCES = {"pairs": 1.0, "answers": 0.5, "steps": 2.0}
FROZEN = {"policy": {}}


def pairs(rows, seed=0, length=8):
    rng = np.random.default_rng(seed + 50)
    return Pairs(
        chosen=texts(rows, length, seed),
        rejected=texts(rows, length, seed + 1),
        label=rng.choice([1.0, 0.8, 0.5, 0.0], rows).astype(np.float32),
        margin=rng.choice([0.0, 0.5], rows).astype(np.float32),
        votes=np.full((rows, 1), np.nan, np.float32),
        record=np.arange(rows, dtype=np.int32),
    )


def answers(rows, seed=10, length=8):
    rng = np.random.default_rng(seed + 60)
    return Labelled(
        texts=texts(rows, length, seed), label=rng.integers(0, 2, rows).astype(np.float32)
    )


def steps(rows, seed=20, length=8):
    rng = np.random.default_rng(seed + 70)
    given = texts(rows, length, seed)
    ends = given.mask & (np.arange(length)[None] % 3 == 2)
    # Labels between step ends are not read: they may be anything.
    labels = np.where(ends, rng.integers(0, 2, ends.shape), np.nan).astype(np.float32)
    return Steps(texts=given, step_ends=ends, labels=labels)


def mixture():
    return {"pairs": pairs(4), "answers": answers(8), "steps": steps(4)}


def blank(rows):
    """The same rows as padding: what fills up the last batch of an evaluation."""
    return jax.tree.map(np.zeros_like, rows)


def stack(a, b):
    return jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b)


def trainer(model, sources, optimizer, mesh=None, **options):
    """mixture -> metrics, on a state that is kept in the returned function's `state`."""
    mesh = mesh or one_device()
    frozen_params = init(model, 0, mesh)
    state = create_supervised_state(frozen_params, optimizer, mesh)
    step = make_supervised_step(model, sources, optimizer, **options)
    compiled = compile_update(step, state, mesh, exact=False)

    def train(rows):
        with jax.set_mesh(mesh):
            rows = shard_batch(mesh, RULES, rows)
            train.state, metrics = compiled(train.state, FROZEN, rows, jax.random.key(0))
        return {name: float(m.total) / max(float(m.count), 1) for name, m in metrics.items()}

    train.state, train.compiled = state, compiled
    return train


def evaluator(model, sources, **options):
    mesh = one_device()
    compiled = compile_evaluate(make_supervised_evaluate(model, sources, **options), mesh)

    def evaluate(params, rows):
        with jax.set_mesh(mesh):
            metrics = compiled(params, FROZEN, jax.tree.map(jnp.asarray, rows))
        return {name: (float(m.total), float(m.count)) for name, m in metrics.items()}

    return evaluate


def test_rows_behind_the_last_record_are_no_rows():
    model = decoder(REWARD, RULES)
    mixture = {"pairs": pairs(6), "answers": answers(6), "steps": steps(6)}
    whole = jax.tree.map(lambda x: x[:4], mixture)
    params = {"policy": init(model, 0, one_device())}
    found = evaluator(model, SOURCES)(params, first_rows(mixture, 4))
    wanted = evaluator(model, SOURCES)(params, whole)
    assert found.keys() == wanted.keys()
    for name, (total, count) in wanted.items():
        assert found[name][1] == count and found[name][0] == pytest.approx(total, abs=1e-5)
    assert found["loss/pairs"][1] == 4


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def cross_entropy(score, label):
    return -(label * np.log(sigmoid(score)) + (1 - label) * np.log(sigmoid(-score)))


def expected_metrics(model, params, rows):
    """Every metric as (total, count), by Python loops over rows."""

    def scores(given, head):
        return host(evaluate_texts(model, params, {}, given).scores[head])

    def last(given):
        read = scores(given, "outcome")
        return [read[i, given.mask[i].sum() - 1] for i in range(len(read))]

    sums = {}

    def count(name, value, present=True):
        total, number = sums.get(name, (0.0, 0.0))
        sums[name] = (total + value, number + 1) if present else (total, number)

    def classify(name, score, label):
        right = float((score > 0) == (label > 0.5))
        count(f"{name}/accuracy", right)
        count(f"{name}/accuracy_right", right, label > 0.5)
        count(f"{name}/accuracy_wrong", right, label <= 0.5)

    given = rows["pairs"]
    both = zip(last(given.chosen), last(given.rejected), given.label, given.margin, strict=True)
    for chosen, rejected, label, margin in both:
        gap = np.float64(chosen) - rejected
        agree, disagree = np.log(sigmoid(gap - margin)), np.log(sigmoid(-gap - margin))
        count("loss/pairs", -(label * agree + (1 - label) * disagree))
        count("pairs/accuracy", float((gap > 0) == (label > 0.5)), label != 0.5)
        count("pairs/score_chosen", chosen)
        count("pairs/score_rejected", rejected)
    given = rows["answers"]
    for score, label in zip(last(given.texts), given.label, strict=True):
        count("loss/answers", cross_entropy(score, label))
        classify("answers", score, label)
    given, read = rows["steps"], scores(rows["steps"].texts, "process")
    for i, ends in enumerate(given.step_ends):
        losses = []
        for t in np.flatnonzero(ends):
            losses.append(cross_entropy(read[i, t], given.labels[i, t]))
            classify("steps", read[i, t], given.labels[i, t])
        if losses:
            count("loss/steps", np.mean(losses))
    return sums


def test_evaluation_agrees_with_loops_and_ignores_rows_of_padding():
    model, rows = decoder(REWARD, RULES), mixture()
    params = init(model, 0, one_device())
    expected = expected_metrics(model, params, rows)
    padded = {name: stack(part, blank(part)) for name, part in rows.items()}
    got = evaluator(model, SOURCES, microbatches=2)({"policy": params}, padded)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value[1] > 0, name
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_microbatches_devices_and_doubled_rows_change_nothing():
    """Doubling one source's rows leaves its mean alone, and so must the other sources' share."""
    model, rows, sgd = decoder(REWARD, RULES), mixture(), optax.sgd(0.1)
    options = dict(centre_coef=0.01)
    train = trainer(model, SOURCES, sgd, **options)
    metrics, first = train(rows), host(train.state.params)
    wanted = sum(SOURCES[name] * metrics[f"loss/{name}"] for name in SOURCES)
    wanted += 0.01 * metrics["loss/pairs_centre"]
    assert metrics["update/loss"] == pytest.approx(wanted, abs=1e-5)
    assert int(train.state.step) == 1

    doubled = rows | {"answers": stack(rows["answers"], rows["answers"])}
    mesh = make_mesh({"data": 2, "tensor": 2})
    split = trainer(model, SOURCES, sgd, mesh=mesh, microbatches=2, **options)
    again = split(doubled)
    assert_close(split.state.params, first, atol=1e-5)
    for name, value in metrics.items():
        assert again[name] == pytest.approx(value, abs=2e-5), name
    layout = jax.tree.map(lambda x: x.sharding, split.state)
    for _ in range(2):
        split(doubled)
    assert split.compiled._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, split.state) == layout


def counting_up(rows, length, seed):
    """Token t+1 is token t plus one: a pattern that one step of memory suffices for."""
    start = np.random.default_rng(seed).integers(0, VOCAB, (rows, 1))
    ones = np.ones((rows, length), bool)
    return Texts(
        tokens=((start + np.arange(length)) % VOCAB).astype(np.int32),
        mask=ones,
        loss_mask=ones,
        segment=ones.astype(np.int32),
    )


def test_fine_tuning_learns_a_pattern_and_skips_what_is_not_finite():
    model = decoder(config(), RULES)
    train = trainer(model, {"texts": 1.0}, optax.adam(1e-2))
    losses = [train({"texts": counting_up(8, 8, seed)})["loss/texts"] for seed in range(60)]
    assert losses[0] > 2.0 and losses[-1] < 0.1
    assert train.compiled._cache_size() == 1
    evaluate = evaluator(model, {"texts": 1.0})
    unseen = counting_up(4, 8, 1000)
    total, count = evaluate(train.state.params, {"texts": unseen})["loss/texts"]
    # The first token of a row has no past, so 7 of 8 count.
    assert count == 4 * 7 and total / count < 0.1
    half = dataclasses.replace(unseen, loss_mask=unseen.mask & (np.arange(8)[None] >= 4))
    assert evaluate(train.state.params, {"texts": half})["loss/texts"][1] == 4 * 4

    table = train.state.params["policy"]["embed"]["table"]
    train.state.params["policy"]["embed"]["table"] = table.at[0, 0].set(jnp.nan)
    before = host(train.state)
    metrics = train({"texts": counting_up(8, 8, 0)})
    assert metrics["update/skipped"] == 1.0 and int(train.state.skipped) == 1
    assert_equal(train.state.params, before.params)
    assert_equal(train.state.opt_state, before.opt_state)


def test_a_reward_model_learns_which_token_is_good():
    """A text, or a step, is good if its last token is even."""
    rng = np.random.default_rng(0)
    model = decoder(REWARD, RULES)
    train = trainer(model, SOURCES, optax.adam(1e-2))

    def batch():
        rows = {"pairs": pairs(8), "answers": answers(8), "steps": steps(8)}

        def redraw(given):
            tokens = rng.integers(0, VOCAB, given.tokens.shape).astype(np.int32)
            return dataclasses.replace(given, tokens=tokens)

        def even(given):
            last = given.mask.sum(axis=1) - 1
            return (given.tokens[np.arange(len(last)), last] % 2 == 0).astype(np.float32)

        chosen, rejected = redraw(rows["pairs"].chosen), redraw(rows["pairs"].rejected)
        label = (1 + even(chosen) - even(rejected)) / 2
        margin = np.zeros_like(label)
        rows["pairs"] = dataclasses.replace(
            rows["pairs"], chosen=chosen, rejected=rejected, label=label, margin=margin
        )
        given = redraw(rows["answers"].texts)
        rows["answers"] = Labelled(texts=given, label=even(given))
        given = redraw(rows["steps"].texts)
        labels = (given.tokens % 2 == 0).astype(np.float32)
        rows["steps"] = Steps(texts=given, step_ends=rows["steps"].step_ends, labels=labels)
        return rows

    history = [train(batch()) for _ in range(80)]
    for name in SOURCES:
        late = np.mean([metrics[f"{name}/accuracy"] for metrics in history[-10:]])
        assert late > 0.95, name


def test_a_source_trains_the_head_that_it_names():
    """Two groups that judge the same pairs, a head each; a third source trains the usual one."""
    model = decoder(config(lm_head=False, score_heads=("outcome", "of_a", "of_b")), RULES)
    sources, heads = {"a": 1.0, "b": 0.0, "answers": 0.0}, {"a": "of_a", "b": "of_b"}
    train = trainer(model, sources, optax.sgd(0.1), heads=heads)
    before = host(train.state.params["policy"]["heads"])
    params = {"policy": init(model, 0, one_device())}
    rows = {"a": pairs(4), "b": pairs(4, seed=3), "answers": answers(4)}
    train(rows)
    after = host(train.state.params["policy"]["heads"])
    moved = [name for name in before if (before[name]["kernel"] != after[name]["kernel"]).any()]
    assert moved == ["of_a"]

    found = evaluator(model, sources, heads=heads)(params, rows)
    for name, head in (*heads.items(), ("answers", "outcome")):
        alone = evaluator(model, {name: 1.0}, outcome_head=head)(params, {name: rows[name]})
        assert alone == {key: found[key] for key in alone}
    assert found["loss/a"] != evaluator(model, {"a": 1.0})(params, {"a": rows["a"]})["loss/a"]
    train = trainer(model, {"a": 1.0}, optax.sgd(0.1), heads={"a": "of_c"})
    with pytest.raises(ValueError, match="no head 'of_c'; its heads"):
        train({"a": pairs(4)})


def test_bad_mixtures_are_named():
    model, sgd = decoder(REWARD, RULES), optax.sgd(0.1)
    with pytest.raises(ValueError, match="sources is empty"):
        make_supervised_step(model, {}, sgd)
    with pytest.raises(ValueError, match="microbatches=0"):
        make_supervised_step(model, SOURCES, sgd, microbatches=0)
    train = trainer(model, SOURCES, sgd)
    with pytest.raises(ValueError, match=r"has the sources \['pairs'\]; wanted \['answers'"):
        train({"pairs": pairs(4)})
    train = trainer(model, {"pairs": 1.0}, sgd, outcome_head="quality")
    with pytest.raises(ValueError, match=r"no head 'quality'; its heads: \['outcome', 'process'\]"):
        train({"pairs": pairs(4)})
    train = trainer(model, {"pairs": 1.0}, sgd, microbatches=3)
    with pytest.raises(ValueError, match="4 rows do not split into 3 chunks"):
        train({"pairs": pairs(4)})
