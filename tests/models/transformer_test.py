"""The decoder: an independent NumPy forward, invariants of masks and cache, sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax.mesh import make_mesh, replicate, shard_batch, shard_init
from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from tests.models.batches import plain, tiny

FULL = dict(qkv_bias=True, qk_norm=True, tie_embeddings=False, score_heads=("value", "outcome"))


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, positions, mask):
    hidden = model.apply(params, tokens, positions, mask, None).hidden
    return hidden, model.logits(params, hidden) if model.config.lm_head else None


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


# --- an independent forward pass: loops over rows, positions and heads, float64 ---


def np_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * scale


def np_rotate(vector, position, theta):
    half = len(vector) // 2
    out = np.empty_like(vector)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        out[i] = a * np.cos(angle) - b * np.sin(angle)
        out[i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def np_attention(layer, rows, config):
    """One attention layer on a row of normed states [S][D]: one result per position."""
    projected = {}
    for name in ("query", "key", "value"):
        kernel, bias = layer[name]["kernel"], layer[name].get("bias", 0.0)
        projected[name] = [np.einsum("d,dhk->hk", row, kernel) + bias for row in rows]
    for name, norm in (("query", "query_norm"), ("key", "key_norm")):
        for position, heads in enumerate(projected[name]):
            for h in range(len(heads)):
                if config.qk_norm:
                    heads[h] = np_norm(heads[h], layer[norm]["scale"], config.norm_eps)
                heads[h] = np_rotate(heads[h], position, config.rope_theta)
    out = []
    for position in range(len(rows)):
        mixed = np.zeros((config.heads, config.head_dim))
        for h in range(config.heads):
            g = h // (config.heads // config.kv_heads)  # neighbours share a key/value head
            past = range(position + 1)
            scores = np.array(
                [projected["query"][position][h] @ projected["key"][s][g] for s in past]
            ) / np.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed[h] = sum(w * projected["value"][s][g] for w, s in zip(weights, past, strict=True))
        out.append(np.einsum("hk,hkd->d", mixed, layer["output"]["kernel"]))
    return out


def np_logits(params, tokens, config):
    """Logits [S V] of one row without padding."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = [params["embed"]["table"][t] for t in tokens]
    for i in range(config.layers):
        layer = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        normed = [np_norm(r, layer["attention_norm"]["scale"], config.norm_eps) for r in rows]
        mixed = np_attention(layer["attention"], normed, config)
        rows = [r + m for r, m in zip(rows, mixed, strict=True)]
        for s, row in enumerate(rows):
            n = np_norm(row, layer["mlp_norm"]["scale"], config.norm_eps)
            gate, up = (n @ layer["mlp"][name]["kernel"] for name in ("gate", "up"))
            rows[s] = row + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]
    rows = [np_norm(r, params["final_norm"]["scale"], config.norm_eps) for r in rows]
    tied = config.tie_embeddings
    unembed = params["embed"]["table"].T if tied else params["unembed"]["kernel"]
    return np.stack([r @ unembed for r in rows])


@pytest.mark.parametrize(
    "overrides",
    [
        dict(),
        dict(qkv_bias=True, rope_theta=1e6),
        dict(qk_norm=True, tie_embeddings=False, norm_eps=1e-6),
        dict(heads=6, kv_heads=3, head_dim=8, rope_theta=500),
    ],
)
def test_equals_an_independent_forward(overrides):
    model, params = tiny(**overrides)
    tokens, positions, mask = plain(2, 9)
    _, logits = run(model, params, tokens, positions, mask)
    want = np_logits(params, np.asarray(tokens[1]), model.config)
    assert np.ptp(want) > 1  # far from uniform: the comparison can fail
    close(logits[1], want, 2e-5)


def test_rope_theta_of_the_config_is_honoured():
    model, params = tiny()
    other = decoder(named_size("tiny", rope_theta=1e6))
    _, logits = run(model, params, *plain(2, 9))
    _, changed = run(other, params, *plain(2, 9))
    assert float(jnp.abs(logits - changed).max()) > 1e-3


# --- invariants ---


def test_causal():
    model, params = tiny(**FULL)
    tokens, positions, mask = plain(2, 9)
    changed = tokens.at[:, 6:].set((tokens[:, 6:] + 7) % 260)
    before, _ = run(model, params, tokens, positions, mask)
    after, _ = run(model, params, changed, positions, mask)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert float(jnp.abs(before[:, 6:] - after[:, 6:]).min(axis=-1).max()) > 0


def test_padding_on_the_left_changes_nothing():
    model, params = tiny(**FULL)
    tokens, positions, mask = plain(2, 9)
    want, _ = run(model, params, tokens, positions, mask)
    for pad in (1, 5):
        left = ((0, 0), (pad, 0))
        hidden, _ = run(
            model,
            params,
            jnp.pad(tokens, left, constant_values=9),
            jnp.pad(positions, left),
            jnp.pad(mask, left),
        )
        close(hidden[:, pad:], want, 3e-6)


def test_prefill_and_steps_through_the_cache_equal_the_full_pass():
    model, params = tiny(**FULL)
    tokens, positions, mask = plain(3, 11)
    mask = mask.at[1, :3].set(False)  # one row is left-padded
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    want, want_logits = run(model, params, tokens, positions, mask)
    unstacked = model.unstack(params)
    step = jax.jit(model.apply)
    out = step(unstacked, tokens[:, :6], positions[:, :6], mask[:, :6], model.init_cache(3, 14))
    parts, cache = [out.hidden], out.cache
    for s in range(6, 11):
        here = (slice(None), slice(s, s + 1))
        out = step(unstacked, tokens[here], positions[here], mask[here], cache)
        parts, cache = [*parts, out.hidden], out.cache
    hidden = jnp.concatenate(parts, axis=1)
    valid = np.asarray(mask)
    close(np.asarray(hidden)[valid], np.asarray(want)[valid])
    close(np.asarray(model.logits(params, hidden))[valid], np.asarray(want_logits)[valid])
    np.testing.assert_array_equal(cache.length, [11, 11, 11])
    np.testing.assert_array_equal(cache.mask[:, :11], mask)
    assert not cache.mask[:, 11:].any() and cache.keys[0].shape == (3, 2, 14, 16)


def test_rows_of_a_cache_may_have_different_lengths():
    model, params = tiny()
    unstacked = model.unstack(params)
    tokens, positions, mask = plain(2, 6)
    want, _ = run(model, params, tokens, positions, mask)
    cache = model.init_cache(2, 8)
    step = jax.jit(model.apply)
    out = step(unstacked, tokens[:, :4], positions[:, :4], mask[:, :4], cache)
    # Row 1 forgets two columns; its next token goes to column 2.
    cache = dataclasses.replace(
        out.cache, length=jnp.array([4, 2]), mask=out.cache.mask.at[1, 2:].set(False)
    )
    at = jnp.array([4, 2])
    token = jnp.take_along_axis(tokens, at[:, None], axis=1)
    out = step(unstacked, token, at[:, None], mask[:, :1], cache)
    close(out.hidden[0, 0], want[0, 4])
    close(out.hidden[1, 0], want[1, 2])


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params):
    def loss(params):
        return jnp.mean(jnp.square(run(model, params, *plain(2, 9))[1]))

    return jax.value_and_grad(loss)(params)


@functools.cache
def unrolled():
    model, params = tiny(**FULL)
    return loss_and_grads(model, model.unstack(params))


@pytest.mark.parametrize("remat", ["products", "none", "full", "dots"])
def test_scanned_layers_equal_unrolled_ones_in_values_and_gradients(remat):
    model, params = tiny(**FULL, remat=remat)
    value, grads = loss_and_grads(model, params)
    want, want_grads = unrolled()
    close(value, want, 1e-6 * want)
    jax.tree.map(lambda a, b: close(a, b), model.unstack(grads), want_grads)


def test_nan_embeddings_at_padding_reach_neither_valid_tokens_nor_gradients():
    model, params = tiny(**FULL)
    tokens, positions, mask = plain(2, 9)
    mask = mask.at[0, :4].set(False).at[1, 7:].set(False)
    tokens = jnp.where(mask, tokens % 100, 200)
    poisoned = {**params, "embed": {"table": params["embed"]["table"].at[200].set(jnp.nan)}}

    def loss(params):
        hidden, logits = run(model, params, tokens, positions, mask)
        return jnp.sum(jnp.where(mask[..., None], logits, 0.0) ** 2), hidden

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, hidden), grads = grad(poisoned)
    (_, want), want_grads = grad(params)
    assert bool(jnp.isfinite(hidden).all())  # rows that attend to nothing are harmless
    np.testing.assert_array_equal(hidden, want)
    jax.tree.map(np.testing.assert_array_equal, grads, want_grads)
    assert float(jnp.abs(grads["embed"]["table"][200]).max()) == 0


def test_tokens_at_padding_do_not_matter():
    model, params = tiny(**FULL)
    tokens, positions, mask = plain(2, 9)
    mask = mask.at[0, :4].set(False)
    hidden, _ = run(model, params, tokens, positions, mask)
    other, _ = run(model, params, jnp.where(mask, tokens, 3), positions, mask)
    np.testing.assert_array_equal(hidden, other)


def test_errors():
    model, params = tiny(lm_head=False)
    assert "unembed" not in params
    with pytest.raises(ValueError, match="no LM head"):
        model.logits(params, jnp.zeros((1, 1, 64)))
    with pytest.raises(ValueError, match=r"model\.unstack"):
        model.apply(params, *plain(2, 9), model.init_cache(2, 9))


def test_bfloat16_compute_keeps_float32_streams_and_parameters():
    model, params = tiny(compute_dtype="bfloat16", **FULL)
    exact, _ = tiny(**FULL)
    hidden, logits = run(model, params, *plain(2, 9))
    _, want = run(exact, params, *plain(2, 9))
    assert hidden.dtype == logits.dtype == jnp.float32
    assert model.init_cache(1, 2).keys[0].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    error = float(jnp.abs(logits - want).max())
    assert 1e-4 < error < 0.2  # rounded, not broken


# --- sharding ---

LAYOUTS = [{"data": 2, "tensor": 2}, {"fsdp": 4}]
SPECS = {
    0: dict(
        table=P("tensor"),
        query=P(None, None, "tensor"),
        output=P(None, "tensor"),
        gate=P(None, None, "tensor"),
        down=P(None, "tensor"),
        unembed=P(None, "tensor"),
        outcome=P(),
        hidden=P("data"),
        logits=P("data", None, "tensor"),
    ),
    1: dict(
        table=P(None, "fsdp"),
        query=P(None, "fsdp"),
        output=P(None, None, None, "fsdp"),
        gate=P(None, "fsdp"),
        down=P(None, None, "fsdp"),
        unembed=P("fsdp"),
        outcome=P("fsdp"),
        hidden=P("fsdp"),
        logits=P("fsdp"),
    ),
}


@functools.cache
def fresh():
    model = decoder(named_size("tiny", **FULL))
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.mark.parametrize("case", [0, 1])
def test_born_sharded_and_equal_to_one_device(case):
    model, alone = fresh()
    mesh, want = make_mesh(LAYOUTS[case]), SPECS[case]
    params = shard_init(model.init, jax.random.key(0), mesh, model.rules, model.axes())
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    assert params["embed"]["table"].sharding.spec == want["table"]
    assert attention["query"]["kernel"].sharding.spec == want["query"]
    assert attention["output"]["kernel"].sharding.spec == want["output"]
    assert mlp["gate"]["kernel"].sharding.spec == want["gate"]
    assert mlp["down"]["kernel"].sharding.spec == want["down"]
    assert params["unembed"]["kernel"].sharding.spec == want["unembed"]
    assert params["heads"]["outcome"]["kernel"].sharding.spec == want["outcome"]
    jax.tree.map(lambda a, b: close(a, b, 1e-7), params, alone)

    batch = plain(4, 8)
    with jax.set_mesh(mesh):
        rows = shard_batch(mesh, model.rules, jax.tree.map(np.asarray, batch))
        hidden, logits = jax.jit(lambda p, b: run(model, p, *b))(params, rows)
        scores = jax.jit(model.scores)(params, hidden)
    assert hidden.sharding.spec == want["hidden"] and logits.sharding.spec == want["logits"]
    want_hidden, want_logits = run(model, alone, *batch)
    close(hidden, want_hidden)
    close(logits, want_logits)
    close(scores["outcome"], model.scores(alone, want_hidden)["outcome"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decode_step_on_four_devices_equals_one(layout):
    model, params = tiny(**FULL)
    mesh = make_mesh(layout)
    tokens, positions, mask = plain(4, 5)

    def decode(params, tokens, positions, mask):
        params = model.unstack(params)
        cache = model.init_cache(4, 6)
        first = (slice(None), slice(0, 4))
        out = model.apply(params, tokens[first], positions[first], mask[first], cache)
        last = (slice(None), slice(4, 5))
        return model.apply(params, tokens[last], positions[last], mask[last], out.cache)

    want = jax.jit(decode)(params, tokens, positions, mask)
    with jax.set_mesh(mesh):
        batch = jax.tree.map(np.asarray, (tokens, positions, mask))
        rows = shard_batch(mesh, model.rules, batch)
        out = jax.jit(decode)(replicate(params, mesh), *rows)
    close(out.hidden, want.hidden)
    close(out.cache.keys[1], want.cache.keys[1])


def test_every_leaf_of_a_big_model_has_axes_that_split_it():
    model = decoder(named_size("8b", lora_rank=8, qk_norm=True, score_heads=("value",)))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    named = jax.tree.map(
        lambda leaf, axes: (leaf.shape, axes), shapes, model.axes(), is_leaf=lambda x: x is None
    )
    pairs = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, tuple))
    assert all(len(shape) == len(axes) for shape, axes in pairs)
    split = {"vocab", "embed", "mlp", "heads", "kv_heads"}
    assert all(split & set(axes) for shape, axes in pairs if np.prod(shape) > 100_000)


def test_a_backward_pass_makes_the_products_again_that_were_not_kept():
    def products(remat):
        model = decoder(named_size("tiny", remat=remat))

        def total(params):
            return jnp.sum(model.apply(params, *plain(2, 6), None).hidden)

        gradient = jax.make_jaxpr(jax.grad(total))(model.shapes())
        return str(gradient).count("dot_general[")

    full, dots, kept, none = (products(remat) for remat in ("full", "dots", "products", "none"))
    assert full > dots > kept > none
