"""Checkpoints: bit for bit, onto other meshes, whole or not at all, and clear when broken."""

import dataclasses
import hashlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from rlhf_jax.mesh import make_mesh
from rlhf_jax.training import checkpoint
from rlhf_jax.types import Mean, RunState, TrainState

ROOT = pathlib.Path(__file__).parents[2]


def make_state(seed=0, width=8):
    """A state with everything that a run's may hold: optax's tuples, dataclasses, bfloat16,
    scalars, empty arrays, numpy."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "policy": {
            "layers": {"kernel": jax.random.normal(keys[0], (2, width, 4))},
            "embed": {"table": jax.random.normal(keys[1], (width, 4)).astype(jnp.bfloat16)},
        },
        "value": {"bias": jax.random.normal(keys[2], ())},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return RunState(
        train=TrainState(
            step=jnp.int32(seed),
            params=params,
            opt_state={role: optimizer.init(tree) for role, tree in params.items()},
            algorithm={"seen": jnp.zeros((0, 3))},
            skipped=jnp.int32(0),
            lr_scale=jnp.float32(1),
        ),
        reference={"kernel": jax.random.normal(keys[3], (4, width))},
        rewards={"device": {"orm": {"inner": (), "mean": jnp.float32(0.1)}}, "host": {}},
        controllers={},
        carry=Mean(total=jnp.float32(2.5), count=jnp.float32(3)),
        data_position={"prompts": np.asarray(17, np.int32), "extra/old": np.asarray(3, np.int32)},
    )


def spread(state, mesh, axes):
    """Arrays of two dimensions and more split over `axes`, others whole on the mesh."""

    def place(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        spec = PartitionSpec(*[None] * (leaf.ndim - 2), *axes) if leaf.ndim > 1 else PartitionSpec()
        # From numpy: jax 0.10.2 gives a broken array when it puts one process's own array on a
        # sharding that replicates over processes.
        sharding = NamedSharding(mesh, spec if leaf.size else PartitionSpec())
        return jax.device_put(np.asarray(leaf), sharding)

    return jax.tree.map(place, state)


def abstract(state, sharding=None):
    """`state` as a restore target; numpy leaves as they are."""

    def describe(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding)

    return jax.tree.map(describe, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def same(x, y):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(same, a, b)


def saved(folder, *states, keep=5, every=1):
    """A manager after saving the states as steps 1, 2, ..."""
    manager = checkpoint.open_manager(folder, keep=keep, every=every)
    for step, state in enumerate(states, 1):
        assert checkpoint.save(manager, step, state, f"config {step}")
    checkpoint.wait(manager)
    return manager


def test_a_state_comes_back_bit_for_bit_in_its_own_kinds(tmp_path):
    state = make_state(3)
    manager = saved(tmp_path, state)
    found = checkpoint.restore(manager, state)
    assert_same(state, found)
    assert type(found.train.opt_state["policy"][1][0]) is optax.ScaleByAdamState
    assert isinstance(found.carry, Mean)
    assert isinstance(found.data_position["extra/old"], np.ndarray)
    unplaced = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    found = checkpoint.restore(manager, unplaced)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    assert_same(state, found)
    assert checkpoint.saved_config(manager, 1) == "config 1"
    checkpoint.close(manager)


def test_a_path_may_go_up(tmp_path):
    state = make_state(3)
    (tmp_path / "here").mkdir()
    winding = tmp_path / "here" / ".." / "run"
    checkpoint.close(saved(winding, state))
    manager = checkpoint.open_manager(winding, keep=5, every=1)
    assert_same(state, checkpoint.restore(manager, state))
    checkpoint.close(manager)
    policy = checkpoint.restore_subtree(
        str(winding), ("train", "params"), abstract(state).train.params
    )
    assert_same(state.train.params, policy)


def test_the_mesh_may_differ_from_the_one_that_saved(tmp_path):
    host = make_state(1)
    manager = saved(tmp_path, spread(host, make_mesh({"fsdp": 4}), ("fsdp", None)))
    other = spread(host, make_mesh({"data": 2, "tensor": 2}), ("data", "tensor"))
    found = checkpoint.restore(manager, abstract(other))
    assert_same(host, found)
    jax.tree.map(lambda x, y: x.sharding == y.sharding or pytest.fail(), found.train, other.train)
    table = found.train.params["policy"]["embed"]["table"]
    assert table.addressable_shards[0].data.shape == (4, 2)
    one = SingleDeviceSharding(jax.devices()[1])
    found = checkpoint.restore(manager, abstract(host, one))
    assert_same(host, found)
    assert {x.sharding for x in jax.tree.leaves(found.train)} == {one}
    checkpoint.close(manager)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = make_state(2, width=4096)
    expected = jax.tree.map(np.array, state)
    manager = checkpoint.open_manager(tmp_path, keep=1, every=1)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    spare = jax.tree.map(jnp.copy, state.train)
    overwrite(spare)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(spare) if leaf.size)  # it does donate
    train, reference = state.train, state.reference
    assert checkpoint.save(manager, 1, state, "")
    for _ in range(5):  # in place, or in a copy where the writer still reads a buffer
        train = overwrite(train)
    jax.block_until_ready(train)
    found = checkpoint.restore(manager, expected)
    assert_same(expected, found)
    assert not reference["kernel"].is_deleted()
    checkpoint.close(manager)


def test_every_keep_and_force(tmp_path):
    state = make_state()
    manager = checkpoint.open_manager(tmp_path, keep=2, every=3)
    started = [step for step in range(1, 11) if checkpoint.save(manager, step, state, "")]
    assert started == [3, 6, 9]
    assert checkpoint.save(manager, 10, state, "", force=True)
    assert not checkpoint.save(manager, 10, state, "", force=True)
    checkpoint.close(manager)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "9"]
    again = checkpoint.open_manager(tmp_path, keep=2, every=3)
    assert checkpoint.latest_step(again) == 10
    checkpoint.close(again)


def test_no_checkpoint(tmp_path):
    manager = checkpoint.open_manager(tmp_path / "new", keep=1, every=1)
    assert checkpoint.latest_step(manager) is None
    with pytest.raises(ValueError, match=r"no checkpoint in .*new"):
        checkpoint.restore(manager, make_state())
    checkpoint.close(manager)


def test_bad_input_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(ValueError, match=r"checkpoints is not a folder"):
        checkpoint.open_manager(tmp_path, keep=1, every=1)
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.open_manager(tmp_path / "a", keep=0, every=1)


def replace_params(state, params):
    train = dataclasses.replace(state.train, params=params)
    return dataclasses.replace(state, train=train)


def test_another_tree_is_refused_by_name(tmp_path):
    state = make_state()
    manager = saved(tmp_path, state)
    more = replace_params(state, {**state.train.params, "critic": {"bias": jnp.zeros(2)}})
    with pytest.raises(ValueError, match=r"another run: it lacks train/params/critic/bias$"):
        checkpoint.restore(manager, more)
    fewer = replace_params(state, {"policy": state.train.params["policy"]})
    with pytest.raises(ValueError, match=r"it has train/params/value/bias, unknown"):
        checkpoint.restore(manager, fewer)
    wider = replace_params(state, {**state.train.params, "value": {"bias": jnp.zeros(2)}})
    with pytest.raises(ValueError, match=r"bias is \[\[\], 'float32'\], wanted \[\[2\], 'float32'"):
        checkpoint.restore(manager, wider)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.train.params)
    with pytest.raises(ValueError, match=r"wanted.*bfloat16"):
        checkpoint.restore(manager, replace_params(state, half))
    checkpoint.close(manager)


def test_an_incomplete_folder_is_left_out_and_the_one_before_is_used(tmp_path, caplog):
    first, second = make_state(1), make_state(2)
    checkpoint.close(saved(tmp_path, first, second))
    folder = tmp_path / "checkpoints"
    (folder / "2" / "manifest" / "metadata").unlink()
    manager = checkpoint.open_manager(tmp_path, keep=5, every=1)
    assert "checkpoints/2 is not complete" in caplog.text
    assert checkpoint.latest_step(manager) == 1
    assert_same(first, checkpoint.restore(manager, second))
    assert checkpoint.save(manager, 2, second, "")  # the step can be taken again
    assert_same(second, checkpoint.restore(manager, first))
    checkpoint.close(manager)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "incomplete-2"]


def test_when_nothing_is_complete_the_run_does_not_start_afresh_in_silence(tmp_path):
    checkpoint.close(saved(tmp_path, make_state()))
    (tmp_path / "checkpoints" / "1" / "manifest" / "metadata").write_text('{"config"')
    with pytest.raises(ValueError, match=r"no complete checkpoint.*checkpoints/1.*not JSON"):
        checkpoint.open_manager(tmp_path, keep=5, every=1)


# In a process of its own: the first read that fails ends orbax's event loop, and what the other
# reads then report would fall into whichever test runs at that moment.
DAMAGED = """
import sys
from rlhf_jax.training import checkpoint
from tests.training.checkpoint_test import assert_same, make_state

states = make_state(1, width=20_000), make_state(2, width=20_000)
manager = checkpoint.open_manager(sys.argv[1], keep=5, every=1)
try:
    checkpoint.restore(manager, states[1])
except ValueError as error:
    print(error)
assert_same(states[0], checkpoint.restore(manager, states[1], step=1))
checkpoint.close(manager)
print("the older one is whole")
"""


def test_damaged_data_is_an_error_that_names_the_folder_and_the_way_out(tmp_path):
    checkpoint.close(saved(tmp_path, make_state(1, width=20_000), make_state(2, width=20_000)))
    files = (tmp_path / "checkpoints" / "2" / "state").rglob("d/*")
    arrays = max(files, key=lambda file: file.stat().st_size)
    arrays.write_bytes(bytes(arrays.stat().st_size))  # as long as before
    command = [sys.executable, "-c", DAMAGED, str(tmp_path)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    message, last = ended.stdout.strip().splitlines()
    assert re.search(r"checkpoints/2 cannot be read.*resume from step 1", message)
    assert last == "the older one is whole"


def test_a_file_that_is_cut_short_is_seen_without_reading_arrays(tmp_path, caplog):
    states = make_state(1, width=20_000), make_state(2, width=20_000)
    checkpoint.close(saved(tmp_path, *states))
    assert checkpoint.check_newest(tmp_path) == tmp_path / "checkpoints/2"
    files = (tmp_path / "checkpoints" / "2" / "state").rglob("d/*")
    arrays = max(files, key=lambda file: file.stat().st_size)
    size = arrays.stat().st_size
    arrays.write_bytes(arrays.read_bytes()[: size // 2])
    wanted = rf"checkpoints/2 is not complete: .*ends at byte {size // 2} of .*use step 1"
    with pytest.raises(ValueError, match=wanted):
        checkpoint.check_newest(tmp_path)
    arrays.unlink()
    with pytest.raises(ValueError, match=f"{arrays.name} is absent"):
        checkpoint.check_newest(tmp_path)
    manager = checkpoint.open_manager(tmp_path, keep=5, every=1)
    assert "is absent" in caplog.text
    assert_same(states[0], checkpoint.restore(manager, states[1]))
    checkpoint.close(manager)


KILLED = """
import os, signal, sys
from rlhf_jax.training import checkpoint
from tests.training.checkpoint_test import make_state

manager = checkpoint.open_manager(sys.argv[1], keep=5, every=1)
checkpoint.save(manager, 1, make_state(1, width=200_000), "")
checkpoint.wait(manager)
checkpoint.save(manager, 2, make_state(2, width=200_000), "")
os.kill(os.getpid(), signal.SIGKILL)
"""


def environment(**changes):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **changes}


# One device per process, compiled as this process compiles: random numbers differ in their last
# bits between levels of optimisation.
ONE_DEVICE = f"--xla_backend_optimization_level={os.environ['RLHF_TEST_XLA_LEVEL']}"


def test_a_kill_during_a_save_leaves_whole_checkpoints_only(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment(), capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    manager = checkpoint.open_manager(tmp_path, keep=5, every=1)
    step = checkpoint.latest_step(manager)
    assert step in (1, 2)  # 2 if the disk was faster than the signal
    expected = make_state(step, width=200_000)
    assert_same(expected, checkpoint.restore(manager, expected))
    checkpoint.close(manager)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["1", "2"][:step]  # nothing is left of what was interrupted


def test_digest_does_not_depend_on_the_layout_but_on_everything_else():
    params = make_state(5).train.params
    expected = checkpoint.digest(params)
    for axes, split in (
        ({"fsdp": 4}, ("fsdp", None)),
        ({"data": 2, "tensor": 2}, (None, "tensor")),
    ):
        assert checkpoint.digest(spread(params, make_mesh(axes), split)) == expected
    assert checkpoint.digest(jax.tree.map(np.asarray, params)) == expected
    reordered = {role: params[role] for role in reversed(sorted(params))}
    assert checkpoint.digest(reordered) == expected
    value = params["value"]["bias"]
    changes = [
        {**params, "value": {"bias": jnp.nextafter(value, jnp.float32(9))}},
        {**params, "value": {"scale": value}},
        {**params, "value": {"bias": value[None]}},
        {**params, "value": {"bias": jax.lax.bitcast_convert_type(value, jnp.int32)}},
    ]
    digests = {checkpoint.digest(changed) for changed in changes}
    assert len(digests | {expected}) == 5


def test_digest_literal():
    """Digests in old summaries stay comparable. If the definition has to change, say so in the
    change log and renew this number."""
    tree = {"b": np.asarray([1.0, 2.0], np.float32), "a": {"c": np.asarray(3, np.int32)}}
    expected = "64134197c9328b4de6b70668b96ff1600d91bdf44ad4fd0eb81fe4fc71cc0f50"
    assert checkpoint.digest(tree) == expected
    lines = b"a/c () int32\n" + b"\x03\0\0\0" + b"b (2,) float32\n" + b"\0\0\x80\x3f\0\0\0\x40"
    assert hashlib.sha256(lines).hexdigest() == expected


PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from rlhf_jax.mesh import make_mesh
from rlhf_jax.training import checkpoint
from tests.training.checkpoint_test import abstract, make_state, saved, spread

state = spread(make_state(4), make_mesh({"fsdp": 2}), ("fsdp", None))
checkpoint.close(saved(sys.argv[3], state))
manager = checkpoint.open_manager(sys.argv[3], keep=1, every=1)
other = abstract(spread(make_state(0), make_mesh({"tensor": 2}), (None, "tensor")))
found = checkpoint.restore(manager, other)
table = found.train.params["policy"]["embed"]["table"]
assert table.addressable_shards[0].data.shape == (8, 2), table.sharding
checkpoint.close(manager)
print(checkpoint.digest(found.train.params), found.data_position["prompts"], flush=True)
"""


def test_two_processes_save_and_restore_one_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number), str(tmp_path)],
            env=environment(XLA_FLAGS=ONE_DEVICE),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    expected = make_state(4)
    for process in started:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err[-3000:]
        found = out.strip().splitlines()[-1]
        assert found == f"{checkpoint.digest(expected.train.params)} 17"
    manager = checkpoint.open_manager(tmp_path, keep=1, every=1)  # and one process reads it
    assert_same(expected, checkpoint.restore(manager, expected))
    checkpoint.close(manager)
