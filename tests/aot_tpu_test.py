"""The four steps of PPO compiled for 16 TPU chips that are not there: memory, copies, collectives.

Memory is what the compiler says one chip needs (`memory_analysis`), the rest is read from the
text of the compiled programs. The small shape runs always; the 8B shape is slow.
"""

import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.mesh import make_mesh
from rlhf_jax.models.config import ModelConfig, named_size
from tests import hlo
from tests.aot import STEPS, Iteration, Sizes, topology_devices

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]'",
)

TOPOLOGY = "v5p:2x2x4"
CHIPS = 16
HBM = 95 * 2**30  # bytes per chip, https://cloud.google.com/tpu/docs/v5p
TRAINING = dict(compute_dtype="bfloat16", remat="full", tie_embeddings=False)
SMALL = dict(vocab_size=8192, width=256, layers=2, mlp_width=512, logprob_chunk=64)
SHAPES = {
    # As small as leaves whole tiles per chip; both batch axes are used.
    "small": Sizes(
        ModelConfig(heads=4, kv_heads=2, head_dim=128, **SMALL, **TRAINING),
        {"data": 2, "fsdp": 4, "tensor": 2},
        prompts=32,
        samples=4,
        prompt_tokens=128,
        max_tokens=128,
        microbatches=2,
    ),
    "8b": Sizes(
        named_size("8b", **TRAINING),
        {"fsdp": 8, "tensor": 2},
        prompts=64,
        samples=4,
        prompt_tokens=512,
        max_tokens=1536,
        microbatches=4,
    ),
}


# Single forward passes, which the update makes too, are compiled alone with --all.
ONCE = [
    pytest.param(step, marks=pytest.mark.slow) if step in ("score", "evaluate") else step
    for step in STEPS
]


@pytest.fixture(scope="module", params=["small", pytest.param("8b", marks=pytest.mark.slow)])
def iteration(request):
    return Iteration(SHAPES[request.param], topology_devices(TOPOLOGY))


def size(tree):
    """Bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def share(tree):
    """Bytes of one chip's part of all leaves."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def held(iteration, step):
    """The parameters and statistics that a step reads."""
    state = iteration.state
    return {
        "generate": state.params["policy"],
        "score": iteration.reward.init(),
        "evaluate": (state.params, iteration.frozen),
        "update": state,
    }[step]


def memory(iteration, step):
    return iteration.program(step).compiled.memory_analysis()


def new_bytes(analysis):
    """Bytes per chip that a step's results take beside its donated arguments."""
    return analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def text(iteration, step):
    return hlo.parse(iteration.program(step).compiled.as_text())


def decode_loop(iteration):
    """The program of `generate`, the loop in it that carries the cache, one layer's keys: those
    of the prompts, and those that each sample has of its own."""
    sizes, axes, program = iteration.sizes, iteration.mesh.shape, text(iteration, "generate")
    config, shards = sizes.config, axes["data"] * axes["fsdp"]
    prompts = sizes.prompts // shards
    heads = config.kv_heads // axes["tensor"]
    once = (prompts, heads, sizes.prompt_tokens, config.head_dim)
    own = (prompts * sizes.samples, heads, sizes.max_tokens - 1, config.head_dim)
    return program, hlo.loop_with(program, own, 2 * config.layers), once, own


def test_every_tree_is_split_evenly_over_the_chips(iteration):
    """A chip's part is 1/(fsdp x tensor) of each matrix; of norms, which have no axis on
    "tensor", it is 1/fsdp, and of a handful of scalars the whole."""
    parts = iteration.mesh.shape["fsdp"] * iteration.mesh.shape["tensor"]
    state = iteration.state
    trees = (state.params, state.opt_state, iteration.frozen, iteration.reward.init())
    for tree in trees:
        assert 1 <= share(tree) / (size(tree) / parts) < 1.001
        for leaf in jax.tree.leaves(tree):
            if leaf.ndim > 1 and leaf.size > 2**17:
                assert share(leaf) * parts == size(leaf), leaf
    # Three trees each of float32, with two counters in each role's optimizer.
    assert size(state.opt_state) == 2 * size(state.params) + 4 * 4


@pytest.mark.parametrize("step", ONCE)
def test_a_step_takes_the_split_share_and_copies_none_of_it(iteration, step):
    used, analysis = share(held(iteration, step)), memory(iteration, step)
    batch = share(iteration.rollouts)
    # A batch is padded to whole tiles and comes with scores and values.
    assert used <= analysis.argument_size_in_bytes < 1.001 * used + 4 * batch
    assert new_bytes(analysis) < 4 * batch
    if step == "update":
        assert analysis.alias_size_in_bytes >= used


@pytest.mark.parametrize("step", ONCE)
def test_a_step_fits_beside_everything_that_stays(iteration, step):
    state, analysis = iteration.state, memory(iteration, step)
    stays = share((state, iteration.frozen, iteration.reward.init(), iteration.rollouts))
    code = analysis.generated_code_size_in_bytes
    assert stays + analysis.temp_size_in_bytes + new_bytes(analysis) + code < HBM


@pytest.mark.parametrize("step", ONCE)
def test_logits_of_all_tokens_never_exist(iteration, step):
    sizes, tensor = iteration.sizes, iteration.mesh.shape["tensor"]
    vocab, shards = sizes.config.vocab_size, CHIPS // tensor
    rows = sizes.prompts * sizes.samples if step == "generate" else sizes.rows
    everything = rows // shards * sizes.max_tokens
    assert everything > sizes.config.width  # embeddings are allowed
    tokens = {
        math.prod(shape) // dim
        for lines in text(iteration, step).values()
        for instruction in lines
        for shape in instruction.shapes
        for dim in (vocab, vocab // tensor)
        if dim in shape
    }
    assert max(tokens, default=0) < everything
    if step in ("evaluate", "update"):
        assert rows // shards * sizes.config.logprob_chunk in tokens  # one chunk does


def test_the_decode_loop_makes_no_array_as_large_as_a_cache(iteration):
    program, loop, once, own = decode_loop(iteration)
    assert loop.shapes.count(once) == 2 * iteration.sizes.config.layers
    together = math.prod(own) // own[2] * (once[2] + own[2])
    assert hlo.new_arrays(program, loop, together) == []
    # Weights on their way to faster memory may be as large as either part, but not of its shape.
    # A prompt's part, which is only read, may be on its way there too.
    parts = [sorted(shape) for shape in (once, own)]
    new = hlo.new_arrays(program, loop, min(math.prod(once), math.prod(own)))
    new = [line for line in new if not (hlo.is_fetch(line) and once in line.shapes)]
    assert [line for line in new for shape in line.shapes if sorted(shape) in parts] == []
    # A start per row would be a loop over the rows, in every layer.
    inner = [
        line.name
        for name in hlo.reachable(program, loop.called)
        for line in program[name]
        if line.opcode == "while"
    ]
    assert inner == []


def test_the_decode_loop_joins_only_chips_of_one_batch_shard(iteration):
    program, loop, *_ = decode_loop(iteration)
    tensor, joins = iteration.mesh.shape["tensor"], hlo.collectives(program, loop)
    # The output and down projections of each layer end in a sum over "tensor".
    assert len(joins) >= 2 * iteration.sizes.config.layers
    for join in joins:
        groups = hlo.groups_of(join, CHIPS)
        assert all(len({place // tensor for place in group}) == 1 for group in groups), join.line


def test_no_array_repeats_the_keys_of_the_prompts(iteration):
    program, _, once, own = decode_loop(iteration)
    repeated = (own[0], *once[1:])
    assert all(repeated not in line.shapes for lines in program.values() for line in lines)
    whole = (*own[:2], once[2] + own[2], own[3])
    assert all(whole not in line.shapes for lines in program.values() for line in lines)


def test_weights_are_gathered_for_decoding_in_the_compute_type(iteration):
    config, program = iteration.sizes.config, text(iteration, "generate")
    matrix = config.width * config.kv_heads * config.head_dim // iteration.mesh.shape["tensor"]
    gathers = [
        line
        for lines in program.values()
        for line in lines
        if line.opcode in ("all-gather", "all-gather-start") and line.elements >= matrix
    ]
    table = (config.vocab_size // iteration.mesh.shape["tensor"], config.width)
    wide = [line.shapes[-1] for line in gathers if "bf16" not in line.dtypes]
    # Embeddings are looked up as they are stored, like in training.
    assert wide == [table] and len(gathers) > 1


def test_rollouts_lie_as_the_steps_after_them_expect(iteration):
    found = iteration.program("generate").compiled.output_shardings
    wanted = jax.tree.map(lambda x: (x.sharding, x.ndim), iteration.rollouts)
    wanted = jax.tree.leaves(wanted, is_leaf=lambda x: isinstance(x, tuple))
    for sharding, (expected, ndim) in zip(jax.tree.leaves(found), wanted, strict=True):
        assert sharding.is_equivalent_to(expected, ndim)


def test_a_loop_that_rewrites_its_cache_and_waits_for_all_shards_is_found():
    mesh, cache = make_mesh({"fsdp": 16}, devices=topology_devices(TOPOLOGY)), (4, 2, 384, 128)

    def decode(cache, alive):
        columns = jnp.arange(cache.shape[2])[None, None, :, None]

        def step(state):
            cache, alive, column = state
            cache = jnp.where(columns == column, jnp.sin(cache[:, :, :1]), cache)
            return cache, alive & (cache[:, 0, 0, 0] > 0), column + 1

        return jax.lax.while_loop(lambda state: state[1].any(), step, (cache, alive, 0))

    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    arguments = (
        jax.ShapeDtypeStruct((64, *cache[1:]), jnp.bfloat16, sharding=rows),
        jax.ShapeDtypeStruct((64,), bool, sharding=rows),
    )
    program = hlo.parse(jax.jit(decode).lower(*arguments).compile().as_text())
    loop = hlo.loop_with(program, cache, 1)
    assert hlo.new_arrays(program, loop, math.prod(cache))
    joined = [len(group) for c in hlo.collectives(program, loop) for group in hlo.groups_of(c, 16)]
    assert max(joined) > 1


def test_collectives_are_read_in_every_notation():
    def groups(notation):
        line = f"  ROOT %r = f32[2]{{0}} all-reduce(%x), {notation}, to_apply=%add"
        program = hlo.parse(f"ENTRY %main (x: f32[2]) -> f32[2] {{\n{line}\n}}")
        return hlo.groups_of(program["main"][0], 4)

    assert groups("replica_groups={{0,1},{2,3}}") == [[0, 1], [2, 3]]
    assert groups("replica_groups={}") == [[0, 1, 2, 3]]
    assert groups("replica_groups=[2,2]<=[4]") == [[0, 1], [2, 3]]
    assert groups("replica_groups=[2,2]<=[2,2]T(1,0)") == [[0, 2], [1, 3]]
    assert groups("replica_groups=mesh['a'=2,'b'=2] {'b'}") == [[0, 1], [2, 3]]
    assert groups("replica_groups=mesh['a'=2,'b'=2] {'a'}") == [[0, 2], [1, 3]]
    assert groups("replica_groups=mesh['a'=2,'b'=2] {'a','b'}") == [[0, 1, 2, 3]]
    ordered = "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}"
    assert groups(ordered) == [[0, 2], [1, 3]]
    assert groups("source_target_pairs={{0,2},{2,0}}") == [[0, 2], [2, 0]]
