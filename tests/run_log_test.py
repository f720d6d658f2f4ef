"""What a loop writes: where it resumes, when it stops, and what a rerun keeps."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from rlhf_jax.mesh import make_mesh
from rlhf_jax.ops.metrics import single
from rlhf_jax.run_log import RunLog, last_line
from rlhf_jax.training.state import create_train_state
from rlhf_jax.types import RunState


def config(steps=4):
    return ConfigDict(
        dict(
            train=dict(steps=steps, max_skipped=3),
            log=dict(every=1),
            checkpoint=dict(every=2, keep=2),
        )
    )


@pytest.fixture
def mesh():
    return make_mesh({"data": -1})


def new_state(mesh):
    with jax.set_mesh(mesh):
        params = {"policy": {"w": jnp.arange(4.0)}}
        train = create_train_state(params, {"policy": optax.sgd(0.1)}, dict, mesh)
    return RunState(
        train=train,
        reference={},
        rewards={},
        controllers={},
        carry={},
        data_position={"prompts": np.asarray(0, np.int32)},
    )


def numbers(loss=0.5, in_row=0.0, skipped=0.0):
    values = {
        "update/loss": loss,
        "update/skipped": skipped,
        "update/skipped_in_row": in_row,
        "reward/never": math.nan,
    }
    return {name: single(value) for name, value in values.items()}


def test_a_rerun_of_a_finished_run_keeps_its_numbers(tmp_path, mesh):
    with RunLog(tmp_path, config()) as log:
        state, first = log.restore(new_state(mesh))
        assert first == 0
        for step in range(4):
            log.metrics(step, numbers(loss=float(step)))
            log.checkpoint(step + 1, state)
        log.finish(4, state, 0.0)
    before = json.loads((tmp_path / "summary.json").read_text())
    assert before["update/loss"] == 3.0
    with RunLog(tmp_path, config()) as log:
        state, first = log.restore(new_state(mesh))
        assert first == 4
        log.finish(4, state, 0.0)
    after = json.loads((tmp_path / "summary.json").read_text())
    assert after["update/loss"] == before["update/loss"]
    assert after["params_sha256"] == before["params_sha256"]
    assert after["resumed_at"] == 4


def test_a_resumed_run_never_holds_two_states(tmp_path, mesh):
    with RunLog(tmp_path, config()) as log:
        state, _ = log.restore(new_state(mesh))
        log.checkpoint(2, state)
    fresh = new_state(mesh)
    with RunLog(tmp_path, config()) as log:
        restored, first = log.restore(fresh)
    assert first == 2
    assert fresh.train.params["policy"]["w"].is_deleted()
    assert not restored.train.params["policy"]["w"].is_deleted()


def test_too_many_updates_that_are_not_finite_in_a_row_stop_the_run(tmp_path, mesh):
    with RunLog(tmp_path, config()) as log:
        state, _ = log.restore(new_state(mesh))
        log.metrics(0, numbers())
        log.checkpoint(2, state)
        log.metrics(1, numbers(loss=math.nan, in_row=2.0, skipped=1.0))
        log.metrics(2, numbers(loss=math.nan, in_row=4.0, skipped=0.5))
        with pytest.raises(FloatingPointError, match=r"4 updates.*update/loss.*step 2") as error:
            log.metrics(3, numbers())
        assert "reward/never" not in str(error.value)


def test_a_reward_that_learns_is_watched_as_the_policy_is(tmp_path, mesh):
    with RunLog(tmp_path, config()) as log:
        log.restore(new_state(mesh))
        own = {"reward/implicit/loss": single(math.nan)}
        for count in (2.0, 3.0):
            log.metrics(0, numbers() | own | {"reward/implicit/skipped_in_row": single(count)})
        said = r"3 updates of reward/implicit in a row.*not finite: reward/implicit/loss;"
        with pytest.raises(FloatingPointError, match=said):
            log.metrics(1, numbers())


def test_the_last_line_is_that_of_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_line(path, 0) == {}
    path.write_text('{"a": 1.0, "step": 0, "time/step": 2.0}\n{"a": 2.0, "step": 1}\n')
    assert last_line(path, 0) == {"a": 1.0}
    assert last_line(path, 5) == {}
