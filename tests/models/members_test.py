"""Ensembles of every family against their members one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.completions import evaluate_completions, evaluate_texts, member_name
from rlhf_jax.models.lora import partition
from rlhf_jax.models.members import (
    average,
    average_members,
    each_member,
    member_of,
    num_parameters,
    repeated,
)
from tests.models.batches import rollouts, texts, tiny

MEMBERS = 3
PLAIN = dict(lm_head=False, score_heads=("outcome", "process"), layers=1)
FAMILIES = {
    "independent": dict(ensemble="independent"),
    "linear": dict(ensemble="linear"),
    "lora": dict(ensemble="lora", lora_rank=2),
}


def ensemble(family, members=MEMBERS):
    return tiny(**PLAIN, **FAMILIES[family], members=members)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_members_one_by_one(family):
    model, params = ensemble(family)
    batch, rows = rollouts(2, 2, 3, 4), texts(3, 6)
    one, _ = tiny(**PLAIN, lora_rank=model.config.lora_rank)
    both = jax.jit(
        lambda m, tree: (
            evaluate_completions(m, tree, {}, batch, temperature=1.0, rows=2).scores,
            evaluate_texts(m, tree, {}, rows).scores,
        ),
        static_argnums=0,
    )
    together = both(model, params)
    apart = [both(one, member_of(params, model.config, e)) for e in range(MEMBERS)]
    for part, whole in enumerate(together):
        for head in model.config.score_heads:
            each = np.stack([scores[part][head] for scores in apart])
            assert np.abs(each[0] - each[1]).max() > 0.01
            named = [whole[member_name(head, e)] for e in range(MEMBERS)]
            np.testing.assert_allclose(named, each, atol=1e-5)
            np.testing.assert_allclose(whole[head], each.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_counts_are_those_of_the_family(family):
    """k(M + L), M + kL and M + kL + kA."""
    k, heads = 5, PLAIN["score_heads"]
    trunk = num_parameters(tiny(**{**PLAIN, "score_heads": ()})[1])
    plain = num_parameters(tiny(**PLAIN)[1])
    adapters = num_parameters(tiny(**PLAIN, lora_rank=2)[1]) - plain
    head = plain - trunk
    # One kernel as wide as the model for each head; the process head has a constant besides.
    assert head == len(heads) * tiny(**PLAIN)[0].config.width + 1
    want = {
        "independent": k * (trunk + head),
        "linear": trunk + k * head,
        "lora": trunk + k * head + k * adapters,
    }
    model, params = ensemble(family, k)
    assert num_parameters(params) == want[family]
    trained, base = partition(params, model.config)
    if family == "lora":
        assert num_parameters(base) == trunk and num_parameters(trained) == k * (head + adapters)


@pytest.mark.parametrize("family", FAMILIES)
def test_members_are_born_apart_and_the_first_as_one_model_would_be(family):
    model, _ = ensemble(family)
    one, _ = tiny(**PLAIN, lora_rank=model.config.lora_rank)
    params = jax.jit(model.init)(jax.random.key(3))
    first = member_of(params, model.config, 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        first,
        jax.jit(one.init)(jax.random.key(3)),
    )
    kernels = params["heads"]["outcome"]["kernel"]
    assert kernels.shape == (MEMBERS, model.config.width)
    assert len({float(kernel[0]) for kernel in kernels}) == MEMBERS

    def named(leaf, axes):
        assert leaf.ndim == len(axes) and ("members" in axes) == (axes[:1] == ("members",))

    jax.tree.map(named, params, model.axes())


def test_a_linear_ensemble_reads_a_text_once():
    """Arithmetic of the compiled programs: five heads cost next to nothing beside the trunk."""
    rows = texts(4, 16)

    def flops(model, params):
        scores = jax.jit(lambda tree: evaluate_texts(model, tree, {}, rows).scores)
        return scores.lower(params).compile().cost_analysis()["flops"]

    one = flops(*tiny(**PLAIN))
    assert flops(*ensemble("linear", 5)) < 1.1 * one
    # Members without a common trunk run in turn: a loop's body is counted once.
    assert flops(*ensemble("independent", 5)) == pytest.approx(one, rel=0.01)


def test_an_ensemble_starts_from_one_model_with_heads_of_its_own():
    _, single = tiny(**PLAIN)
    for family in FAMILIES:
        model, params = ensemble(family)
        start = repeated(single, model.config)
        assert "heads" not in start
        shapes = {str(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
        for path, leaf in jax.tree.leaves_with_path(start):
            assert leaf.shape == shapes[str(path)]
        table = np.asarray(start["embed"]["table"])
        first = table[1] if family == "independent" else table
        np.testing.assert_array_equal(first, single["embed"]["table"])


def test_averages_by_hand():
    a = {"x": {"kernel": jnp.array([1.0, 2.0])}, "b": jnp.array(3.0, jnp.bfloat16)}
    b = {"x": {"kernel": jnp.array([3.0, 6.0])}, "b": jnp.array(5.0, jnp.bfloat16)}
    mean = average([a, b])
    np.testing.assert_array_equal(mean["x"]["kernel"], [2.0, 4.0])
    assert float(mean["b"]) == 4.0 and mean["b"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="differ in shape"):
        average([a, {"x": {"kernel": jnp.zeros(3)}, "b": b["b"]}])
    with pytest.raises(ValueError, match="no models"):
        average([])


def test_the_average_of_linear_members_scores_as_their_mean():
    """Heads are linear, so weights and scores average alike; of whole models they do not."""
    rows, (one, _) = texts(3, 5), tiny(**PLAIN)
    for family, same in (("linear", True), ("independent", False)):
        model, params = ensemble(family)
        mean = evaluate_texts(model, params, {}, rows).scores["outcome"]
        averaged = average_members(params, model.config)
        got = evaluate_texts(one, averaged, {}, rows).scores["outcome"]
        assert np.allclose(got, mean, atol=1e-5) == same


def test_gradients_stay_with_their_member():
    model, params = ensemble("lora")
    rows = texts(2, 4)

    def loss(tree):
        said = each_member(lambda one: _outcome(one, rows), tree, model.config)
        return jnp.sum(jnp.square(said[1]))

    def _outcome(one, rows):
        single, _ = tiny(**PLAIN, lora_rank=2)
        return evaluate_texts(single, one, {}, rows).scores["outcome"]

    grads = jax.jit(jax.grad(loss))(params)
    kernel = np.asarray(grads["heads"]["outcome"]["kernel"])
    assert np.abs(kernel[1]).max() > 0
    np.testing.assert_array_equal(kernel[[0, 2]], 0)


def test_bad_ensembles_are_named():
    config = tiny(**PLAIN)[0].config
    for changes, message in (
        (dict(members=2), "members=2 with ensemble='none'"),
        (dict(ensemble="linear"), "members=1 with ensemble='linear'"),
        (dict(members=2, ensemble="bagged"), "ensemble='bagged'; known: none, independent"),
        (dict(members=2, ensemble="lora"), "set model.lora_rank"),
        (dict(members=2, ensemble="independent", lora_rank=2), "whole models have no adapters"),
        (dict(members=2, ensemble="linear", lm_head=True), "no LM head"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)
