"""What the compiled decode loop does and does not do: casts, collectives, trips."""

import collections
import dataclasses
import functools
import re

import jax
import jax.extend
import numpy as np
import pytest

from rlhf_jax.mesh import ShardingRules, make_mesh, shard_batch, shardings_for
from rlhf_jax.models.transformer import decoder
from tests.sampling.sampler_test import (
    CONFIG,
    K,
    N,
    T,
    arguments,
    jitted,
    make_model,
    make_prompts,
    make_tables,
    sample,
)

BF16 = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


TRUNCATING = dict(temperature=0.9, top_k=6, top_p=0.95)


def on_mesh(mesh, model, params):
    """Parameters and prompts placed as a run places them."""
    rules = ShardingRules()
    params = jax.device_put(params, shardings_for(model.axes(), params, mesh, rules))
    return params, shard_batch(mesh, rules, make_prompts())


@functools.cache
def compiled(axes: tuple[tuple[str, int], ...], manual: bool = True):
    """The program for four devices and its arguments; not `manual`: the compiler's own split."""
    model, params = make_model()
    mesh = make_mesh(dict(axes))
    params, prompts = on_mesh(mesh, model, params)
    with jax.set_mesh(mesh):
        run = jitted(model, mesh=mesh if manual else None)
        given = arguments(params, 0, prompts, **TRUNCATING)
        return run.lower(*given).compile(), given


@pytest.mark.parametrize("axes", [(("data", 2), ("tensor", 2)), (("fsdp", 4),)])
def test_four_devices_sample_what_one_device_samples(axes):
    one = sample(**TRUNCATING)
    program, given = compiled(axes)
    four = program(*given)
    for name in ("tokens", "mask", "step_ends", "truncated", "sample", "version"):
        np.testing.assert_array_equal(getattr(one, name), getattr(four, name))
    np.testing.assert_allclose(one.logprobs, four.logprobs, atol=1e-5)
    np.testing.assert_allclose(one.behaviour_logprobs, four.behaviour_logprobs, atol=1e-5)
    rows = N * K // (4 if "fsdp" in dict(axes) else 2)
    assert {shard.data.shape for shard in four.tokens.addressable_shards} == {(rows, T)}


def test_prompts_that_do_not_divide_are_refused():
    model, params = make_model()
    mesh = make_mesh({"fsdp": 4})
    with pytest.raises(ValueError, match="3 prompts do not divide over 4 shards"):
        jitted(model, mesh=mesh)(*arguments(params, 0, make_prompts(3)))


def computations(text: str) -> dict[str, str]:
    """Name -> body of every computation of an HLO module."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    return dict(found)


def reachable(parts: dict[str, str], roots: set[str]) -> set[str]:
    seen, todo = set(), set(roots)
    while todo:
        name = todo.pop()
        seen.add(name)
        called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", parts[name])
        for group in re.findall(
            r"(?:branch_computations|called_computations)=\{(.*?)\}", parts[name]
        ):
            called += re.findall(r"%?([\w.\-]+)", group)
        todo |= set(called) - seen
    return seen


def groups_of(line: str) -> list[set[int]]:
    """The device groups of one collective, in any of HLO's notations."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    if named:
        sizes = {n: int(k) for n, k in re.findall(r"'(\w+)'=(\d+)", named[1])}
        inside = re.findall(r"'(\w+)'", named[2])
        outside = [n for n in sizes if n not in inside]
        ids = np.arange(4).reshape(list(sizes.values()))
        order = [list(sizes).index(n) for n in outside + inside]
        shape = (-1, int(np.prod([sizes[n] for n in inside])))
        return [set(row.tolist()) for row in ids.transpose(order).reshape(shape)]
    if iota:
        shape, dims = ([int(x) for x in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(np.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(x) for x in iota[3].split(",")])
        return [set(row.tolist()) for row in ids.reshape(shape)]
    assert listed is not None, line
    return [{int(x) for x in row.split(",")} for row in re.findall(r"\{([\d,]+)\}", listed[1])]


def collectives_in_loops(text: str) -> list[tuple[str, list[set[int]]]]:
    parts = computations(text)
    roots = set()
    for body in parts.values():
        for line in body.splitlines():
            if " while(" in line:
                roots |= set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", line))
    assert roots
    return [
        (kind, groups_of(line))
        for name in reachable(parts, roots)
        for line in parts[name].splitlines()
        for kind in COLLECTIVES
        if re.search(rf" {kind}(-start)?\(", line)
    ]


def test_loop_has_collectives_of_tensor_groups_only():
    found = collectives_in_loops(compiled((("data", 2), ("tensor", 2)))[0].as_text())
    assert found  # tensor parallelism needs some
    for kind, groups in found:
        assert all(group in ({0, 1}, {2, 3}) for group in groups), (kind, groups)


def test_loop_of_pure_batch_parallelism_has_no_collective():
    assert collectives_in_loops(compiled((("fsdp", 4),))[0].as_text()) == []


def test_without_shard_map_the_loop_would_talk_across_the_batch():
    # Shows that the two tests above can fail: the compiler's own partition of the same loop.
    program, _ = compiled((("data", 2), ("tensor", 2)), manual=False)
    found = collectives_in_loops(program.as_text())
    assert any(len(group & {0, 1}) < len(group) for _, groups in found for group in groups[:1])


def test_each_shard_stops_when_its_own_rows_have_ended():
    model, params = make_model()
    trips = collections.Counter()

    def apply(params, tokens, positions, mask, cache=None, **options):
        if tokens.shape[1] == 1:
            shard = jax.lax.axis_index("fsdp")
            jax.debug.callback(lambda i: trips.update([int(i)]), shard)
        return model.apply(params, tokens, positions, mask, cache, **options)

    mesh = make_mesh({"fsdp": 4})
    params, prompts = on_mesh(mesh, model, params)
    tables = make_tables((1, 2, 3, 4))  # short completions
    with jax.set_mesh(mesh):
        run = jitted(model._replace(apply=apply), mesh=mesh)
        rollouts = run(*arguments(params, 0, prompts, tables))
        lengths = np.asarray(rollouts.mask).sum(axis=1)
        jax.effects_barrier()
    longest = lengths.reshape(4, K).max(axis=1)  # one prompt per shard
    assert len(set(longest)) > 1
    # The first token comes from the prefill.
    assert [trips[i] for i in range(4)] == (longest - 1).tolist()


def inner_jaxprs(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values())):
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from inner_jaxprs(value.jaxpr)


@pytest.mark.parametrize("tie", [True, False])
def test_weights_are_cast_and_unstacked_before_the_loop(tie):
    model = decoder(dataclasses.replace(BF16, tie_embeddings=tie))
    params = jax.eval_shape(model.init, jax.random.key(0))
    run = jitted(model)
    closed = jax.make_jaxpr(run)(params, *arguments(None)[1:])
    loops = [
        equation.params["body_jaxpr"].jaxpr
        for jaxpr in inner_jaxprs(closed.jaxpr)
        for equation in jaxpr.eqns
        if equation.primitive.name == "while"
    ]
    assert loops
    layers = jax.tree.leaves(params["layers"])
    stacked = {leaf.shape for leaf in layers}
    matrices = {leaf.shape[1:] for leaf in layers if leaf.ndim > 2}
    matrices |= {params["embed"]["table"].shape, params["embed"]["table"].shape[::-1]}
    dots = 0
    for loop in loops:
        for jaxpr in inner_jaxprs(loop):
            for equation in jaxpr.eqns:
                shapes = {variable.aval.shape for variable in equation.invars}
                assert not shapes & stacked, equation
                cast = equation.primitive.name == "convert_element_type"
                assert not (cast and shapes & matrices), equation
                dots += equation.primitive.name == "dot_general" and bool(shapes & matrices)
    assert dots >= 7 * CONFIG.layers + 1  # every matrix is used in the loop
