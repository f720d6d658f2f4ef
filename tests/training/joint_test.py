"""Heads that train together: losses by loops, exact parts, and what each of them is moved by."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.mesh import make_mesh, shard_batch
from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import decoder
from rlhf_jax.ops.advantage import advantage
from rlhf_jax.ops.odin import odin
from rlhf_jax.training.supervised import (
    create_supervised_state,
    make_supervised_evaluate,
    make_supervised_step,
)
from rlhf_jax.training.update import compile_update
from rlhf_jax.types import Texts
from tests.training.supervised_test import answers, blank, pairs, stack, steps
from tests.training.tiny import RULES, assert_close, assert_equal, config, host, init, one_device
from tests.training.tiny import texts as rows_of
from tests.worlds.linear import linear_model, zero_heads

WIDTH, VOCAB = 6, 16
PAD = VOCAB  # embeds NaN
ADVANTAGE, ODIN = ("outcome", "expected"), ("quality", "length")
FORMS = {ADVANTAGE: advantage(margin=1.0, bound_coef=0.5, expected_coef=0.3), ODIN: odin()}


def asked(rows, prompts=2):
    """Texts whose first tokens are a prompt, and no longer train."""
    column = np.arange(rows.mask.shape[1])[None]
    return dataclasses.replace(rows, loss_mask=rows.loss_mask & (column >= prompts))


def given(rows=8, seed=0):
    """Pairs with soft labels and margins, of texts with prompts of two tokens."""
    made = pairs(rows, seed)
    sides = {side: asked(getattr(made, side)) for side in ("chosen", "rejected")}
    return dataclasses.replace(made, **sides)


@functools.cache
def linear(heads):
    """(model, parameters, features of tokens); those of PAD are NaN."""
    rng = np.random.default_rng(3)
    start = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), zero_heads(WIDTH, heads)
    )
    features = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    features = np.concatenate([features, np.full((1, WIDTH), np.nan, np.float32)])
    return linear_model(WIDTH, heads, trunk=zero_padding), start, features


def zero_padding(tree, rows, mask):
    """The trunk of `linear`: padding embeds 0 whatever lies there, as in the decoder."""
    del tree
    return jnp.where(mask[..., None], rows, 0.0)


def padded_by(token, mixture):
    """The same texts with a token of its own in all padding."""

    def put(texts):
        if not isinstance(texts, Texts):
            return texts
        return dataclasses.replace(texts, tokens=np.where(texts.mask, texts.tokens, token))

    return jax.tree.map(put, mixture, is_leaf=lambda leaf: isinstance(leaf, Texts))


def said(heads, start, features, texts):
    """By head, the number at each text's last token, and what is expected at its prompt's end."""
    rows = np.arange(len(texts.tokens))
    ends = features[texts.tokens[rows, texts.mask.sum(1) - 1]]
    found = {}
    for name in heads:
        one = start["heads"][name]
        read = features[texts.tokens[:, 1]] if name == "expected" else ends
        found[name] = read @ one["kernel"] + one.get("bias", 0.0)
    return found


def loss_of(heads, start, features, mixture):
    """The whole loss, written anew with plain means over the batch."""
    rows = mixture["pairs"]
    better, worse = (said(heads, start, features, side) for side in (rows.chosen, rows.rejected))
    p = rows.label

    def preference(d):
        right, wrong = jax.nn.log_sigmoid(d - rows.margin), jax.nn.log_sigmoid(-d - rows.margin)
        return -jnp.mean(p * right + (1 - p) * wrong)

    if heads == ADVANTAGE:
        a, b = better["outcome"], worse["outcome"]

        def bound(one, other):
            return -jax.nn.log_sigmoid(1.0 - one) - jax.nn.log_sigmoid(1.0 + other)

        taught = [(better["expected"], a), (worse["expected"], b)]
        if "answers" in mixture:
            sampled = said(heads, start, features, mixture["answers"])
            taught = [(sampled["expected"], sampled["outcome"])]
        wrong = [0.5 * (e - jax.lax.stop_gradient(r)) ** 2 for e, r in taught]
        extra = 0.5 * jnp.mean(p * bound(a, b) + (1 - p) * bound(b, a))
        return preference(a - b) + extra + 0.3 * jnp.mean(jnp.concatenate(wrong))
    both = {name: jnp.concatenate([better[name], worse[name]]) for name in heads}
    tokens = np.concatenate([side.loss_mask.sum(1) for side in (rows.chosen, rows.rejected)])

    def rho(x):
        x, y = x - x.mean(), tokens - tokens.mean()
        return (x * y).sum() / jnp.sqrt((x**2).sum() * (y**2).sum())

    d = sum(better[name] - worse[name] for name in heads)
    weights = [start["heads"][name]["kernel"] for name in heads]
    return (
        preference(d)
        + jnp.abs(rho(both["quality"]))
        - rho(both["length"])
        + jnp.abs(weights[0] @ weights[1])
    )


def stepped(heads, mixture, microbatches):
    """(change of the parameters by a step of length 1, metrics)."""
    model, start, features = linear(heads)
    optimizer, mesh = optax.sgd(1.0), one_device()
    step = make_supervised_step(
        model, dict.fromkeys(mixture, 1.0), optimizer, microbatches=microbatches,
        outcome_head=heads[0], joint=FORMS[heads],
    )  # fmt: skip
    with jax.set_mesh(mesh):
        state = create_supervised_state(start, optimizer, mesh)
        frozen = {"policy": {"features": jnp.asarray(features)}}
        after, metrics = jax.jit(step)(state, frozen, mixture, jax.random.key(0))
    change = jax.tree.map(lambda a, b: np.asarray(b - a), start, after.params["policy"])
    return change, {n: float(m.total) / max(float(m.count), 1) for n, m in metrics.items()}


@pytest.mark.parametrize("heads", [ADVANTAGE, ODIN])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_step_is_the_gradient_of_the_whole_batchs_loss_in_any_parts(heads, microbatches):
    _, start, features = linear(heads)
    mixture = {"pairs": given()}
    loss, grads = jax.value_and_grad(lambda tree: loss_of(heads, tree, features, mixture))(start)
    change, metrics = stepped(heads, mixture, microbatches)
    assert_close(change, jax.tree.map(lambda g: -g, grads), atol=2e-6)
    assert metrics["update/loss"] == pytest.approx(float(loss), abs=2e-6)
    assert metrics["update/terms_empty"] == 0


@pytest.mark.parametrize(
    ("heads", "names"),
    [
        (ODIN, ("pairs/quality_correlation", "pairs/accuracy", "loss/pairs_length")),
        (ADVANTAGE, ("pairs/expected", "pairs/accuracy", "loss/pairs_bound", "answers/score")),
    ],
)
def test_rows_of_padding_and_unequal_parts_change_nothing(heads, names):
    """The last part holds padding alone, the one before it fewer pairs than the others; NaN in what
    padding embeds."""
    mixture = {"pairs": given(6)}
    if heads == ADVANTAGE:
        mixture |= {"answers": asked(rows_of(6, 8, 30))}
    padded = {name: stack(rows, blank(stack(rows, rows))) for name, rows in mixture.items()}
    padded = {name: jax.tree.map(lambda x: x[:16], rows) for name, rows in padded.items()}
    (plain, before), (cut, after) = (
        stepped(heads, padded_by(PAD, rows), parts) for rows, parts in ((mixture, 1), (padded, 4))
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))
    assert_close(plain, cut, atol=2e-6)
    for name in names:
        assert after[name] == pytest.approx(before[name], abs=1e-6)


def test_sampled_answers_alone_say_what_is_expected():
    _, start, features = linear(ADVANTAGE)
    mixture = {"pairs": given(), "answers": asked(rows_of(8, 8, 30))}
    loss, grads = jax.value_and_grad(lambda t: loss_of(ADVANTAGE, t, features, mixture))(start)
    change, metrics = stepped(ADVANTAGE, mixture, 2)
    assert_close(change, jax.tree.map(lambda g: -g, grads), atol=2e-6)
    assert metrics["update/loss"] == pytest.approx(float(loss), abs=2e-6)
    sampled = said(ADVANTAGE, start, features, mixture["answers"])
    assert metrics["answers/expected"] == pytest.approx(float(sampled["expected"].mean()), abs=1e-6)
    assert metrics["answers/score"] == pytest.approx(float(sampled["outcome"].mean()), abs=1e-6)
    assert "loss/pairs_expected" not in metrics and "loss/pairs_bound" in metrics


def test_evaluation_judges_by_the_head_that_pays():
    _, start, features = linear(ODIN)
    rows = given()
    evaluate = make_supervised_evaluate(
        linear(ODIN)[0], {"pairs": 1.0}, outcome_head="quality", joint=odin()
    )
    with jax.set_mesh(one_device()):
        frozen = {"policy": {"features": jnp.asarray(features)}}
        found = jax.jit(evaluate)({"policy": start}, frozen, {"pairs": rows})
    found = {name: float(m.total / m.count) for name, m in found.items()}
    sides = [said(ODIN, start, features, side) for side in (rows.chosen, rows.rejected)]
    decided = rows.label != 0.5
    for name, heads in (("accuracy", ODIN[:1]), ("accuracy_with_length", ODIN)):
        gap = sum(sides[0][head] - sides[1][head] for head in heads)
        right = (gap > 0) == (rows.label > 0.5)
        assert found[f"pairs/{name}"] == pytest.approx(float(right[decided].mean()))
    assert found["pairs/score_chosen"] == pytest.approx(float(sides[0]["quality"].mean()), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [ADVANTAGE, ODIN])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_decoder_with_adapters_or_without_on_four_devices_in_parts(heads, rank):
    """The same step on one device at once and on four in two parts, NaN in what padding embeds."""
    sizes = config(vocab_size=VOCAB + 1, lm_head=False, score_heads=heads, lora_rank=rank)
    model = decoder(sizes, RULES)
    mixture = {"pairs": given()}
    if heads == ADVANTAGE:
        mixture |= {"answers": answers(8)}
    mixture = padded_by(PAD, mixture)
    found = []
    for mesh, parts in ((one_device(), 1), (make_mesh({"data": 2, "fsdp": 2}), 2)):
        tree = init(model, 0, mesh)
        table = tree["embed"]["table"].at[PAD].set(jnp.nan)
        tree = tree | {"embed": tree["embed"] | {"table": table}}
        trained, base = partition(tree, model.config)
        optimizer = optax.sgd(0.1)
        state = create_supervised_state(trained, optimizer, mesh)
        step = make_supervised_step(
            model, dict.fromkeys(mixture, 1.0), optimizer, microbatches=parts,
            outcome_head=heads[0], joint=FORMS[heads],
        )  # fmt: skip
        compiled = compile_update(step, state, mesh, exact=False)
        with jax.set_mesh(mesh):
            rows = shard_batch(mesh, RULES, mixture)
            for _ in range(2):
                state, metrics = compiled(state, {"policy": base}, rows, jax.random.key(0))
        assert compiled._cache_size() == 1
        found.append((host(state.params), {n: float(m.total) for n, m in metrics.items()}))
    for trees, _ in found:  # NaN where it was put, and nowhere else
        embed = trees["policy"].get("embed")
        if embed is not None:
            assert np.isnan(embed["table"][PAD]).all()
            embed["table"] = embed["table"][:PAD]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))
    assert_close(found[0][0], found[1][0], atol=2e-5)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-4)
    assert not np.array_equal(
        found[0][0]["policy"]["heads"][heads[1]]["kernel"],
        host(init(model, 0, one_device()))["heads"][heads[1]]["kernel"],
    )


@pytest.mark.slow
def test_what_is_expected_moves_the_trunk_and_no_other_head():
    """No gradient of e's error goes through its target, so the outcome head stays; scores move all
    the same, as both heads read one trunk."""
    model = decoder(config(lm_head=False, score_heads=ADVANTAGE), RULES)
    params, rows = init(model, 0, one_device()), given()
    before = evaluate_texts(model, params, {}, rows.chosen).scores
    optimizer = optax.sgd(1.0)
    step = make_supervised_step(
        model, {"answers": 1.0}, optimizer, joint=advantage(expected_coef=1.0)
    )
    state = create_supervised_state(params, optimizer, one_device())
    mixture = {"answers": asked(rows_of(8, 8, 30))}
    with jax.set_mesh(one_device()):
        after = jax.jit(step)(state, {"policy": {}}, mixture, jax.random.key(0))[0].params
    heads = after["policy"]["heads"]
    assert_equal(heads["outcome"], params["heads"]["outcome"])
    assert not np.array_equal(heads["expected"]["kernel"], params["heads"]["expected"]["kernel"])
    now = evaluate_texts(model, after["policy"], {}, rows.chosen).scores
    for name in ADVANTAGE:
        assert not np.array_equal(before[name], now[name])


def test_bad_models_are_named():
    sgd, outcome = optax.sgd(0.1), linear_model(WIDTH, ("outcome",))
    with pytest.raises(ValueError, match="has the heads 'outcome' and 'expected'"):
        make_supervised_step(outcome, {"pairs": 1.0}, sgd, joint=advantage())
    with pytest.raises(ValueError, match=r"ODIN trains the heads \('quality', 'length'\)"):
        make_supervised_step(outcome, {"pairs": 1.0}, sgd, joint=odin())
    with pytest.raises(ValueError, match=r"smoothing=0\.1: labels follow one head"):
        make_supervised_step(linear(ODIN)[0], {"p": 1.0}, sgd, joint=odin(), smoothing=0.1)
    members = decoder(config(lm_head=False, score_heads=ODIN, members=2, ensemble="linear"), RULES)
    with pytest.raises(ValueError, match="ODIN with 2 members"):
        make_supervised_step(members, {"pairs": 1.0}, sgd, joint=odin())
    with pytest.raises(TypeError, match="holds Steps; ODIN trains on Pairs alone"):
        stepped(ODIN, {"steps": steps(4)}, 1)
