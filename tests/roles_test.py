"""Parameters by role: what is known is kept, what is missing is drawn, all in new buffers."""

import dataclasses

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from rlhf_jax import roles, run_folder
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.config import named_size
from rlhf_jax.models.lora import merge_lora, partition
from rlhf_jax.models.transformer import decoder
from rlhf_jax.text import hub
from rlhf_jax.training import checkpoint
from rlhf_jax.training.state import create_train_state
from rlhf_jax.types import RunState
from tests.models.load_test import LLAMA, write_folder

RULES = ShardingRules()
TINY = named_size("tiny", layers=1, vocab_size=20)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "tensor": 2})


def test_fill_keeps_what_is_known_and_draws_the_rest(mesh):
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        policy = roles.fill(decoder(TINY, RULES), {}, key, mesh, RULES)
        config = dataclasses.replace(TINY, lm_head=False, score_heads=("value",))
        value = roles.fill(decoder(config, RULES), policy, key, mesh, RULES)
    assert value["heads"].keys() == {"value"}
    np.testing.assert_array_equal(value["embed"]["table"], policy["embed"]["table"])
    # A copy: donating one must not delete the other.
    assert value["embed"]["table"] is not policy["embed"]["table"]
    policy["embed"]["table"].delete()
    assert np.isfinite(np.asarray(value["embed"]["table"])).all()


def test_a_value_begins_with_the_first_head_of_a_reward():
    params = {"embed": 1, "heads": {"outcome": {"kernel": 2}, "process": {"kernel": 3}}}
    assert roles.rename_head(params, "value")["heads"] == {"value": {"kernel": 2}}
    assert roles.rename_head({"embed": 1}, "value") == {"embed": 1}


def saved_run(folder, config, mesh):
    """A folder of a run that trained ``config``, and its full parameters."""
    run_folder.prepare(str(folder), ConfigDict(dict(seed=0)), {"policy": config})
    with jax.set_mesh(mesh):
        params = roles.fill(decoder(config, RULES), {}, jax.random.key(1), mesh, RULES)
        params = jax.tree.map(lambda x: x + 0.01, params)  # adapters that say something
        trained, base = partition(params, config)
        train = create_train_state({"policy": trained}, {"policy": optax.sgd(1.0)}, dict, mesh)
    state = RunState(
        train=train, reference=base, rewards={}, controllers={}, carry={}, data_position={}
    )
    manager = checkpoint.open_manager(folder, keep=1, every=1)
    checkpoint.save(manager, 3, state, "{}", force=True)
    checkpoint.close(manager)
    return params


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_folder_gives_plain_parameters_on_another_mesh(tmp_path, mesh, rank):
    config = dataclasses.replace(TINY, lora_rank=rank)
    params = saved_run(tmp_path, config, mesh)
    other = make_mesh({"fsdp": 4})
    with jax.set_mesh(other):
        loaded = roles.load(str(tmp_path), other, RULES)
    wanted = merge_lora(params, config) if rank else params
    assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
    close = jax.tree.map(lambda a, b: jnp.allclose(np.asarray(a), np.asarray(b)), loaded, wanted)
    assert all(jax.tree.leaves(close))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, mesh):
    saved_run(tmp_path, TINY, mesh)
    section = ConfigDict(dict(init_from=str(tmp_path)))
    assert roles.describe(section, 20) == TINY
    with pytest.raises(ValueError, match="tokenizer has 21 tokens"):
        roles.describe(section, 21)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        roles.describe(ConfigDict(dict(init_from=str(tmp_path))), 20)


def test_a_name_of_the_hub_is_a_folder_of_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    section = ConfigDict(dict(init_from="org/name"))
    words = r"^model\.init_from='org/name' is no local path, .* local cache .* hub does not give"
    with pytest.raises(ValueError, match=words):
        roles.describe(section, 20)
    kept = tmp_path / "models--org--name"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    folder = write_folder(kept / "snapshots" / ("0" * 40), LLAMA)
    assert roles.describe(section, 20).width == LLAMA["hidden_size"]
    roles.check_start("model", "org/name")
    assert hub.local_folder("org/name") == str(folder)
    assert hub.local_folder("no/such/model") == "no/such/model"  # a path, which is not there
