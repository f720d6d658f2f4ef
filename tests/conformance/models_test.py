"""What every decoder must keep, whatever its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.models.lora import join, partition
from tests.models.batches import plain, rollouts, tiny

OPTIONS = {
    "qwen": dict(qkv_bias=True, qk_norm=True, tie_embeddings=False, kv_heads=1),
    "heads": dict(score_heads=("value", "outcome", "process"), lm_head=False),
    "lora": dict(lora_rank=2, score_heads=("value",), qkv_bias=True, remat="full"),
    "lora, bfloat16": dict(lora_rank=2, param_dtype="bfloat16", compute_dtype="bfloat16"),
    "gemma": dict(
        norm="rms_plus_one",
        post_norms=True,
        activation="gelu_tanh",
        window=3,
        qk_norm=True,
        local_layers=(True, False),
        rope_theta_local=50.0,
        attention_softcap=5.0,
        logit_softcap=4.0,
        embed_scale=8.0,
        score_heads=("value",),
    ),
    "gpt2": dict(
        norm="layer",
        positions="learned",
        max_positions=16,
        gated_mlp=False,
        mlp_bias=True,
        output_bias=True,
        qkv_bias=True,
        activation="gelu",
        remat="full",
        kv_heads=4,
    ),
    "glm": dict(rope_fraction=0.5, rope_interleaved=True, post_norms=True, rope_scaling="linear"),
    "bfloat16": dict(param_dtype="bfloat16", compute_dtype="bfloat16", remat="dots"),
}


@pytest.fixture(params=OPTIONS, scope="module")
def model_and_params(request):
    return tiny(**OPTIONS[request.param])


def test_axes_name_every_dimension(model_and_params):
    model, params = model_and_params

    def check(path, leaf, axes):
        assert len(axes) == leaf.ndim
        assert all(name in vars(model.rules) for name in axes)
        assert jnp.issubdtype(leaf.dtype, jnp.floating)
        adapter = path[-1].key.startswith("lora_")
        assert leaf.dtype == jnp.dtype("float32" if adapter else model.config.param_dtype)

    jax.tree_util.tree_map_with_path(check, params, model.axes())


def test_causal_and_the_cache_continues_the_full_pass(model_and_params):
    model, params = model_and_params
    tokens, positions, mask = plain(2, 8)
    full = jax.jit(model.apply)
    want = full(params, tokens, positions, mask, None).hidden
    changed = full(params, tokens.at[:, 5:].set(1), positions, mask, None).hidden
    np.testing.assert_array_equal(want[:, :5], changed[:, :5])

    unstacked = model.unstack(params)
    out = full(unstacked, tokens[:, :7], positions[:, :7], mask[:, :7], model.init_cache(2, 8))
    last = full(unstacked, tokens[:, 7:], positions[:, 7:], mask[:, 7:], out.cache)
    # bfloat16 has 8 bits: products of other shapes round differently.
    tolerance = 1e-5 if model.config.compute_dtype == "float32" else 5e-2
    np.testing.assert_allclose(last.hidden[:, 0], want[:, 7], rtol=0, atol=tolerance)


def test_evaluation_and_its_gradient_are_finite_and_float32(model_and_params):
    model, params = model_and_params
    trainable, frozen = partition(params, model.config)
    jax.tree.map(np.testing.assert_array_equal, join(trainable, frozen), params)
    batch = rollouts(4, 2, 4, 6)

    def loss(trainable):
        out = evaluate_completions(model, trainable, frozen, batch, temperature=1.0, rows=4)
        leaves = jax.tree.leaves(out)
        return sum(jnp.mean(jnp.square(leaf)) for leaf in leaves), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    assert set(out.scores) == set(model.config.score_heads)
    assert (out.logprobs is None) != model.config.lm_head
    for leaf in jax.tree.leaves(out):
        assert leaf.shape == (8, 6) and leaf.dtype == jnp.float32
        assert bool(jnp.isfinite(leaf).all()) and float(jnp.abs(leaf).max()) > 0
        assert float(jnp.abs(jnp.where(batch.mask, 0.0, leaf)).max()) == 0
    for grad in jax.tree.leaves(grads):
        assert bool(jnp.isfinite(grad).all()) and float(jnp.abs(grad).max()) > 0
