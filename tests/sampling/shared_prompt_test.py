"""K samples of a prompt read its keys and values from one place: same samples, less memory."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from rlhf_jax.mesh import ShardingRules, make_mesh, shard_batch, shardings_for
from rlhf_jax.sampling import sampler
from rlhf_jax.sampling.methods import make_sampling, row_keys
from rlhf_jax.types import Prompts
from tests import hlo
from tests.sampling.sampler_test import (
    K,
    N,
    T,
    arguments,
    jitted,
    make_model,
    make_prompts,
    make_tables,
)

WINDOWED = dict(window=4, local_layers=(True, False), attention_softcap=2.0)
MODELS = {"full": dict(), "windowed": WINDOWED}


@functools.cache
def model_of(name: str):
    """A model, its parameters, and the compiled samplers of K samples and of one."""
    model, params = make_model(**MODELS[name])
    return model, params, jitted(model), jitted(model, samples=1)


@functools.cache
def repeated(name: str, temperature: float):
    """Each prompt K times, as rows of one sample each that draw the noise of samples 0 ... K-1."""
    prompts = jax.tree.map(lambda x: np.repeat(x, K, axis=0), make_prompts())
    prompts = dataclasses.replace(prompts, draw=np.tile(np.arange(K, dtype=np.int32), N))

    def numbered(key, source, record, draw, sample):
        return row_keys(key, source, record, sample, draw)  # `sample` is 0 in all rows

    _, params, _, alone = model_of(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "row_keys", numbered)
        return alone(*arguments(params, 3, prompts, temperature=temperature))


def assert_same_samples(got, want):
    for name in ("tokens", "mask", "step_ends", "truncated"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got.sample, np.tile(np.arange(K), N))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_samples_of_one_prompt_are_those_of_its_copies(name, temperature):
    _, params, run, _ = model_of(name)
    got = run(*arguments(params, 3, temperature=temperature))
    assert_same_samples(got, repeated(name, temperature))
    tokens = np.asarray(got.tokens).reshape(N, K, T)
    assert (tokens == tokens[:, :1]).all() == (temperature == 0)


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_every_shard_of_four_devices_samples_the_same(axes):
    model, params, *_ = model_of("windowed")
    mesh, rules = make_mesh(axes), ShardingRules()
    placed = jax.device_put(params, shardings_for(model.axes(), params, mesh, rules))
    with jax.set_mesh(mesh):
        prompts = shard_batch(mesh, rules, make_prompts())
        got = jitted(model, mesh=mesh)(*arguments(placed, 3, prompts))
    want = repeated("windowed", 1.0)
    assert_same_samples(got, want)
    for shard in got.tokens.addressable_shards:
        assert shard.data.shape == (N * K // (4 if "fsdp" in axes else 2), T)
        np.testing.assert_array_equal(shard.data, np.asarray(want.tokens)[shard.index])


# --- what the compiled program holds ---

SAMPLES, WIDTH, LAYERS, KV_HEADS, HEAD_DIM = 8, 64, 2, 2, 32
# Elements of one layer's keys of the prompts, once and for every sample.
ONCE = N * KV_HEADS * WIDTH * HEAD_DIM
FOR_EACH = ONCE * SAMPLES


@functools.cache
def compiled():
    model, params = make_model(head_dim=HEAD_DIM)
    tokens, row = np.zeros((N, WIDTH), np.int32), np.zeros(N, np.int32)
    prompts = Prompts(tokens=tokens, mask=tokens == 0, record=row, source=row, draw=row)
    run = jitted(model, samples=SAMPLES, max_tokens=T)
    given = (params, prompts, jax.random.key(0), make_sampling(), make_tables(), np.int32(0))
    return run.lower(*given).compile()


def test_no_array_has_the_size_of_a_repeated_prompt_cache():
    program = hlo.parse(compiled().as_text())
    assert max(line.elements for lines in program.values() for line in lines) < FOR_EACH


def test_the_decode_loop_carries_the_prompts_once_and_copies_none_of_them():
    program = hlo.parse(compiled().as_text())
    own = (N * SAMPLES, KV_HEADS, T - 1, HEAD_DIM)
    loop = hlo.loop_with(program, own, 2 * LAYERS)
    assert loop.shapes.count((N, KV_HEADS, WIDTH, HEAD_DIM)) == 2 * LAYERS
    assert math.prod(own) >= ONCE
    assert hlo.new_arrays(program, loop, ONCE) == []


def test_all_that_the_program_needs_is_less_than_a_repeated_prompt_cache():
    float32, pair = 4, 2
    repeated = float32 * pair * LAYERS * FOR_EACH
    assert compiled().memory_analysis().temp_size_in_bytes < repeated
