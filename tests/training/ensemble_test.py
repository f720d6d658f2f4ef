"""Ensembles train as their members would alone, and labels follow the model."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.lora import partition
from rlhf_jax.models.members import member_of
from rlhf_jax.models.transformer import decoder
from rlhf_jax.training.supervised import (
    create_supervised_state,
    label_tables,
    make_supervised_evaluate,
    make_supervised_step,
)
from rlhf_jax.training.update import compile_update
from tests.training.supervised_test import answers, host, pairs
from tests.training.tiny import RULES, config, init, one_device

MEMBERS = 2
PLAIN = dict(lm_head=False, score_heads=("outcome",), remat="none", layers=1)
SOURCES = {"pairs": 1.0, "answers": 0.5}


def model_of(**changes):
    return decoder(config(**PLAIN, **changes), RULES)


def train(model, params, mixture, **options):
    """(state, metrics) after one step of SGD."""
    mesh, sgd = one_device(), optax.sgd(0.1)
    trained, base = partition(params, model.config)
    init_tables = options.pop("init", lambda: ())
    state = create_supervised_state(trained, sgd, mesh, init=init_tables)
    sources = {name: SOURCES[name] for name in mixture}
    step = make_supervised_step(model, sources, sgd, **options)
    with jax.set_mesh(mesh):
        compiled = compile_update(step, state, mesh, exact=False)
        state, metrics = compiled(state, {"policy": base}, mixture, jax.random.key(0))
    means = {name: float(m.total) / max(float(m.count), 1) for name, m in metrics.items()}
    return host(state), means


def by_member(parts):
    """Row i·E + e is row i of member e's part."""
    return jax.tree.map(lambda *x: np.stack(x, 1).reshape(-1, *x[0].shape[1:]), *parts)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), a, b)


@pytest.mark.parametrize("family", [pytest.param("independent", marks=pytest.mark.slow), "lora"])
def test_members_train_as_they_would_alone(family):
    changes = dict(lora_rank=2) if family == "lora" else {}
    model, one = model_of(members=MEMBERS, ensemble=family, **changes), model_of(**changes)
    params = init(model, 0, one_device())
    parts = [{"pairs": pairs(4, seed=e), "answers": answers(4, seed=9 + e)} for e in range(MEMBERS)]
    options = dict(centre_coef=0.1, microbatches=2)
    whole, metrics = train(model, params, by_member(parts), **options)
    losses = []
    for e in range(MEMBERS):
        alone, found = train(one, member_of(params, model.config, e), parts[e], **options)
        losses.append(found["update/loss"])
        close(member_of(whole.params["policy"], model.config, e), alone.params["policy"])
    assert abs(losses[0] - losses[1]) > 1e-3
    assert metrics["update/loss"] == pytest.approx(sum(losses), abs=1e-5)


def test_linear_members_share_one_pass_and_the_mean_of_their_losses():
    model, one = model_of(members=MEMBERS, ensemble="linear"), model_of()
    params = init(model, 0, one_device())
    mixture = {"pairs": pairs(4)}
    whole, metrics = train(model, params, mixture, microbatches=2)
    alone = [train(one, member_of(params, model.config, e), mixture) for e in range(MEMBERS)]
    assert metrics["update/loss"] == pytest.approx(
        np.mean([found["update/loss"] for _, found in alone]), abs=1e-5
    )
    # A step of SGD on a mean of losses: the trunk goes the mean way, a head its own by 1/E.
    tables = [state.params["policy"]["embed"]["table"] for state, _ in alone]
    close(whole.params["policy"]["embed"]["table"], np.mean(tables, axis=0))
    for e, (state, _) in enumerate(alone):
        start = np.asarray(params["heads"]["outcome"]["kernel"])[e]
        moved = whole.params["policy"]["heads"]["outcome"]["kernel"][e] - start
        close(MEMBERS * moved, state.params["policy"]["heads"]["outcome"]["kernel"] - start)


def test_an_evaluation_tells_what_members_say_together():
    model = model_of(members=MEMBERS, ensemble="linear")
    params, rows = init(model, 0, one_device()), pairs(6)
    evaluate = make_supervised_evaluate(model, {"pairs": 1.0}, microbatches=2)
    with jax.set_mesh(one_device()):
        metrics = jax.jit(evaluate)({"policy": params}, {"policy": {}}, {"pairs": rows})
    gaps = []
    for e in range(MEMBERS):
        sides = []
        for given in (rows.chosen, rows.rejected):
            scores = np.asarray(evaluate_texts(model, params, {}, given).scores[f"outcome/{e}"])
            sides.append(scores[np.arange(6), given.mask.sum(axis=1) - 1])
        gaps.append(sides[0] - sides[1])
    gaps, decided = np.array(gaps), rows.label != 0.5

    def share(gap):
        return np.mean(((gap > 0) == (rows.label > 0.5))[..., decided])

    found = {name: float(m.total / m.count) for name, m in metrics.items()}
    assert found["pairs/accuracy"] == pytest.approx(share(gaps), abs=1e-6)
    assert found["pairs/accuracy_of_mean"] == pytest.approx(share(gaps.mean(axis=0)), abs=1e-6)
    assert found["pairs/disagreement"] == pytest.approx(gaps.std(axis=0).mean(), rel=1e-4)


def test_labels_follow_the_model_when_their_pair_was_drawn():
    model = model_of()
    params, beta = init(model, 0, one_device()), 0.25
    rows = dataclasses.replace(pairs(4), record=np.int32([5, 1, 0, 3]))
    options = dict(smoothing=beta, microbatches=2, init=lambda: label_tables({"pairs": 7}))
    state, metrics = train(model, params, {"pairs": rows}, **options)
    plain, _ = train(model, params, {"pairs": rows})
    close(state.params, plain.params)  # the first labels are those that were given
    ends = []
    for given in (rows.chosen, rows.rejected):
        scores = evaluate_texts(model, state.params["policy"], {}, given).scores["outcome"]
        ends.append(np.asarray(scores)[np.arange(4), given.mask.sum(axis=1) - 1])
    want = (1 - beta) * rows.label + beta / (1 + np.exp(-(ends[0] - ends[1])))
    table = state.algorithm["pairs"]
    np.testing.assert_allclose(table[rows.record], want, atol=1e-5)
    assert np.isnan(table[[2, 4, 6]]).all()
    moved = np.abs(want - rows.label).mean()
    assert metrics["pairs/label_moved"] == pytest.approx(moved, abs=1e-5)
    # From now on the table's labels train.
    again, _ = train(model, params, {"pairs": dataclasses.replace(rows, label=table[rows.record])})
    known = lambda: {"pairs": jax.numpy.asarray(table)}  # noqa: E731
    later, _ = train(model, params, {"pairs": rows}, **(options | dict(init=known)))
    close(later.params, again.params)


def test_bad_smoothing_is_named():
    for beta in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"smoothing={beta}; wanted 0"):
            make_supervised_step(model_of(), SOURCES, optax.sgd(0.1), smoothing=beta)
    model = model_of(members=MEMBERS, ensemble="linear")
    with pytest.raises(ValueError, match=r"smoothing=0\.1 with 2 members"):
        make_supervised_step(model, SOURCES, optax.sgd(0.1), smoothing=0.1)
