"""Evaluation of completions: columns, padding, the update's chunks, memory, devices."""

import math
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.mesh import make_mesh, replicate, shard_batch
from rlhf_jax.models.completions import (
    evaluate_chunk,
    evaluate_completions,
    evaluate_texts,
    split_rollouts,
)
from rlhf_jax.models.lora import partition
from rlhf_jax.ops.groups import join_chunks
from tests.models.batches import rollouts, texts, tiny

HEADS = ("value", "outcome")
# As the compiled steps of a run: otherwise roundings to bfloat16 may be left out in one of them.
EXACT = {"xla_allow_excess_precision": False}


def evaluator(model, rows):
    def evaluate(params, frozen, batch, temperature):
        return evaluate_completions(
            model, params, frozen, batch, temperature=temperature, rows=rows
        )

    return jax.jit(evaluate, compiler_options=EXACT)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_columns_equal_a_loop_over_rows_without_padding(temperature):
    model, params = tiny(score_heads=HEADS, logprob_chunk=3)
    batch = rollouts(2, 2, 4, 7)
    out = evaluator(model, None)(params, {}, batch, temperature)
    full = jax.jit(model.apply)
    for row in range(4):
        prompt, prompt_mask = (
            np.asarray(x)[row // 2] for x in (batch.prompts.tokens, batch.prompts.mask)
        )
        mask = np.asarray(batch.mask)[row]
        ids = np.concatenate([prompt[prompt_mask], np.asarray(batch.tokens)[row][mask]])
        start, count = int(prompt_mask.sum()), int(mask.sum())
        # Right-padded to one length, which causality makes harmless.
        padded = jnp.array(np.pad(ids, (0, 11 - len(ids))))[None]
        everything = jnp.ones((1, 11), bool)
        hidden = full(params, padded, jnp.arange(11)[None], everything, None).hidden
        logits = np.asarray(model.logits(params, hidden)[0], np.float64) / temperature
        logits -= np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        scores = {name: np.asarray(s[0]) for name, s in model.scores(params, hidden).items()}
        for t in range(7):
            at = start + t
            valid = t < count
            entropy = -np.sum(np.exp(logits[at - 1]) * logits[at - 1])
            close(out.logprobs[row, t], logits[at - 1, ids[at]] if valid else 0)
            close(out.entropy[row, t], entropy if valid else 0)
            close(out.scores["value"][row, t], scores["value"][at - 1] if valid else 0)
            close(out.scores["outcome"][row, t], scores["outcome"][at] if valid else 0)


def test_what_lies_in_the_padding_changes_nothing():
    model, params = tiny(score_heads=HEADS)
    batch = rollouts(4, 2, 5, 8)
    evaluate = evaluator(model, 4)
    want = evaluate(params, {}, batch, 1.0)

    def scramble(tokens, mask):
        return jnp.where(mask, tokens, 3)

    prompts = jax.tree.map(lambda x: x, batch.prompts)
    object.__setattr__(prompts, "tokens", scramble(prompts.tokens, prompts.mask))
    other = jax.tree.map(lambda x: x, batch)
    object.__setattr__(other, "prompts", prompts)
    object.__setattr__(other, "tokens", scramble(batch.tokens, batch.mask))
    out = evaluate(params, {}, other, 1.0)
    jax.tree.map(np.testing.assert_array_equal, out, want)


def test_models_without_an_lm_head_give_scores_only():
    model, params = tiny(score_heads=("outcome",), lm_head=False)
    out = evaluator(model, None)(params, {}, rollouts(2, 1, 4, 5), 1.0)
    assert out.logprobs is None and out.entropy is None and set(out.scores) == {"outcome"}


def test_rows_must_cut_whole_groups():
    model, params = tiny()
    batch = rollouts(4, 2, 3, 3)
    for rows in (1, 3, 5, 16, 0):
        with pytest.raises(ValueError, match=f"rows={rows} does not cut 8 rollouts"):
            evaluate_completions(model, params, {}, batch, temperature=1.0, rows=rows)


def test_chunks_keep_groups_and_their_prompts_together():
    batch = rollouts(4, 2, 3, 3)
    chunks = split_rollouts(batch, 2)
    assert chunks.tokens.shape == (2, 4, 3) and chunks.prompts.tokens.shape == (2, 2, 3)
    np.testing.assert_array_equal(chunks.prompts.record, [[0, 2], [1, 3]])
    np.testing.assert_array_equal(chunks.tokens[1], np.asarray(batch.tokens)[[2, 3, 6, 7]])
    np.testing.assert_array_equal(join_chunks(chunks.tokens, 2), batch.tokens)


# (N, K, T, rows) and model options: tied and untied tables take different products.
EQUAL = [
    ((4, 2, 24, 2), dict(remat="full", logprob_chunk=16)),
    ((4, 4, 9, 8), dict(remat="dots", logprob_chunk=4, tie_embeddings=False)),
    ((8, 1, 33, 4), dict(remat="full", qk_norm=True, qkv_bias=True, lora_rank=2)),
]


@pytest.mark.parametrize(("shape", "options"), EQUAL)
def test_the_ratio_of_the_first_microbatch_is_exactly_one(shape, options):
    n, k, t, rows = shape
    model, params = tiny(score_heads=HEADS, **options)
    trainable, frozen = partition(params, model.config)
    batch, temperature = rollouts(n, k, 6, t), jnp.float32(0.7)
    chunks = n * k // rows
    old = evaluator(model, rows)(trainable, frozen, batch, temperature)

    def update(params, frozen, batches, temperature):
        def step(total, chunk):
            def loss(params):
                out = evaluate_completions(
                    model, params, frozen, chunk, temperature=temperature, rows=None
                )
                value = jnp.mean(out.logprobs) + jnp.mean(out.entropy)
                return value + jnp.mean(jnp.square(out.scores["value"])), out

            grads, out = jax.grad(loss, has_aux=True)(params)
            return jax.tree.map(jnp.add, total, grads), out

        return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, params), batches)

    step = jax.jit(update, compiler_options=EXACT)
    grads, new = step(trainable, frozen, split_rollouts(batch, chunks), temperature)
    new = join_chunks(new, k)
    valid = np.asarray(batch.mask)
    assert float(jnp.abs(old.logprobs).min(where=batch.mask, initial=1)) > 0
    np.testing.assert_array_equal(np.exp(new.logprobs - old.logprobs)[valid], 1.0)
    jax.tree.map(np.testing.assert_array_equal, new, old)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def biggest_array(closed) -> int:
    """Elements of the largest array that any equation of a program makes, loops included."""
    biggest = 0
    for equation in closed.jaxpr.eqns:
        biggest = max([biggest, *(v.aval.size for v in equation.outvars)])
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    biggest = max(biggest, biggest_array(inner))
                elif isinstance(inner, jax.extend.core.Jaxpr):
                    biggest = max(biggest, biggest_array(jax.extend.core.ClosedJaxpr(inner, ())))
    return biggest


def biggest_buffer(compiled) -> int:
    """Elements of the largest array in a compiled program."""
    shapes = re.findall(r"(?:f32|bf16|s32|pred)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


def test_logits_of_all_tokens_are_never_formed():
    vocabulary, b, t = 2048, 4, 96
    batch = rollouts(b, 1, 4, t)

    def program(chunk):
        model, params = tiny(vocab_size=vocabulary, logprob_chunk=chunk)

        def loss(params):
            return jnp.sum(evaluate_chunk(model, params, batch, 1.0).logprobs)

        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return biggest_array(jaxpr), biggest_buffer(compiled)

    whole = b * t * vocabulary
    assert program(t) == (whole, whole)  # the test sees what it looks for
    assert max(program(8)) < whole / 2  # what is left are attention weights and the table


@pytest.mark.parametrize("layout", [{"data": 2, "tensor": 2}, {"fsdp": 4}])
def test_four_devices_give_the_numbers_of_one(layout):
    model, params = tiny(score_heads=HEADS)
    batch = rollouts(8, 2, 5, 9)
    evaluate = evaluator(model, 8)
    want = evaluate(params, {}, batch, 0.7)
    mesh = make_mesh(layout)
    with jax.set_mesh(mesh):
        rows = shard_batch(mesh, model.rules, jax.tree.map(np.asarray, batch))
        out = evaluator(model, 8)(replicate(params, mesh), {}, rows, 0.7)
    jax.tree.map(close, out, want)
    shards = 2 if "data" in layout else 4
    assert out.logprobs.addressable_shards[0].data.shape == (16 // shards, 9)


def test_texts_are_read_at_each_token():
    model, params = tiny(score_heads=("outcome",), logprob_chunk=4)
    batch = texts(3, 9)
    out = jax.jit(lambda p, b: evaluate_texts(model, p, {}, b))(params, batch)
    positions = jnp.broadcast_to(jnp.arange(9), (3, 9))
    hidden = jax.jit(model.apply)(params, batch.tokens, positions, batch.mask, None).hidden
    logits = np.asarray(jax.nn.log_softmax(model.logits(params, hidden)))
    scores = np.asarray(model.scores(params, hidden)["outcome"])
    for row in range(3):
        for t in range(9):
            valid = bool(batch.mask[row, t])
            predicted = logits[row, t - 1, batch.tokens[row, t]] if t else 0
            close(out.logprobs[row, t], predicted if valid else 0)
            close(out.scores["outcome"][row, t], scores[row, t] if valid else 0)
