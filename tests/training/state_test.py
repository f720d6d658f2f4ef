"""The train state: born sharded, in buffers of its own, and only what trains is in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.mesh import make_mesh
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import decoder
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import Models, abstract_state, create_state, state_shardings
from rlhf_jax.types import Algorithm, Needs
from tests.training.tiny import assert_equal, config, init, one_device


def nothing(init=lambda: (), needs=Needs()):  # noqa: B008
    return Algorithm(init=init, targets=None, loss=None, needs=needs)


def test_statistics_lie_like_their_parameters_and_scalars_are_on_the_mesh():
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    model = decoder(config())
    params = init(model, 0, mesh)
    optimizer = make_optimizer(learning_rate=1e-3, weight_decay=0.1)
    state = create_state(Models(model), {"policy": params}, {"policy": optimizer}, nothing(), mesh)
    kernel = state.params["policy"]["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    by_shape = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(by_shape) == 4  # gate and up, first and second moments
    assert all(x.sharding == kernel.sharding for x in by_shape)
    for scalar in (state.step, state.skipped, state.lr_scale):
        assert scalar.sharding.mesh == mesh and scalar.sharding.is_fully_replicated


def test_params_are_copied_so_donating_the_state_leaves_the_caller_s_tree_alive():
    mesh, model = one_device(), decoder(config())
    params = init(model, 0, mesh)
    before = jax.tree.map(np.array, params)
    state = create_state(
        Models(model), {"policy": params}, {"policy": optax.sgd(0.1)}, nothing(), mesh
    )
    spend = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    spend(state)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert_equal(params, before)


def test_python_numbers_in_the_algorithm_s_state_become_strong_types():
    mesh, model = one_device(), decoder(config())
    state = create_state(
        Models(model),
        {"policy": init(model, 0, mesh)},
        {"policy": optax.sgd(0.1)},
        nothing(init=lambda: {"mean": 0.0, "seen": 0}),
        mesh,
    )
    assert state.algorithm["mean"].dtype == jnp.float32
    assert not any(x.weak_type for x in jax.tree.leaves(state.algorithm))


def test_lora_state_holds_adapters_and_heads_only():
    mesh = one_device()
    model = decoder(config(lora_rank=2, score_heads=("value",)))
    trained, frozen = partition(init(model, 0, mesh), model.config)
    state = create_state(
        Models(model), {"policy": trained}, {"policy": optax.adam(0.1)}, nothing(), mesh
    )
    for tree in (state.params, state.opt_state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path)
            assert "lora_" in name or "'heads'" in name or leaf.shape == ()
    assert "lora_" not in str(jax.tree.structure(frozen)) and "heads" not in frozen


def test_abstract_state_equals_the_real_one():
    mesh, model = make_mesh({"fsdp": 4}), decoder(config())
    params, optimizers = {"policy": init(model, 0, mesh)}, {"policy": optax.adam(0.1)}
    real = create_state(Models(model), params, optimizers, nothing(), mesh)
    abstract = abstract_state(params, optimizers, nothing().init, mesh)
    describe = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
    assert jax.tree.map(describe, real) == jax.tree.map(describe, abstract)
    shardings = state_shardings(params, optimizers, nothing().init, mesh)
    assert jax.tree.map(lambda x: x.sharding, real) == shardings


def test_impossible_roles_are_named():
    mesh, model = one_device(), decoder(config())
    params, adam = {"policy": init(model, 0, mesh)}, {"policy": optax.adam(0.1)}
    with pytest.raises(ValueError, match="reference"):
        create_state(Models(model), params, adam, grpo(kl_coef=0.1), mesh)
    with pytest.raises(ValueError, match="add 'value' to its score_heads"):
        create_state(Models(model), params, adam, ppo(kl_coef=0.0), mesh)
    with pytest.raises(ValueError, match=r"roles \['policy', 'value'\]"):
        create_state(Models(model, value=model), params, adam, nothing(), mesh)
    with pytest.raises(ValueError, match="roles"):
        create_state(Models(model), params, {"policy": optax.sgd(1), "x": None}, nothing(), mesh)
