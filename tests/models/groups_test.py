"""Samples that read their prompt once: the numbers and gradients of samples with a prompt each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.mesh import make_mesh, replicate, shard_batch
from rlhf_jax.models import passes
from rlhf_jax.models.completions import answer_logits, embed_completions, evaluate_completions
from rlhf_jax.models.lora import partition
from rlhf_jax.models.passes import Layout
from rlhf_jax.types import Rollouts
from tests import hlo
from tests.models.batches import plain, rollouts, tiny
from tests.models.completions_test import HEADS, evaluator

P, T = 6, 9
# Windows are shorter than a prompt and than a completion; learned positions end with the longest
# prompt and completion, so a row of a whole group has more columns than there are positions.
GEMMA = dict(
    norm="rms_plus_one", post_norms=True, window=4, local_layers=(True, False), qk_norm=True,
    rope_theta_local=50.0, attention_softcap=5.0, logit_softcap=4.0, embed_scale=8.0,
)  # fmt: skip
GPT2 = dict(
    norm="layer", positions="learned", max_positions=P + T, gated_mlp=False, mlp_bias=True,
    output_bias=True, qkv_bias=True, activation="gelu", kv_heads=4,
)  # fmt: skip
GLM = dict(rope_fraction=0.5, rope_interleaved=True, tie_embeddings=False, logprob_chunk=4)
ENSEMBLE = dict(lm_head=False, score_heads=("outcome",), members=2)
CASES = {
    "llama": (4, dict(score_heads=HEADS)),
    "gemma": (2, dict(**GEMMA, score_heads=HEADS, remat="dots")),
    "gpt2": (4, dict(**GPT2, remat="full")),
    "glm": (2, dict(**GLM, remat="none")),
    "window": (4, dict(window=3, kv_heads=1)),
    "lora": (4, dict(lora_rank=2, score_heads=("value",), qkv_bias=True)),
    "linear ensemble": (2, dict(**ENSEMBLE, ensemble="linear")),
    "lora ensemble": (2, dict(**ENSEMBLE, ensemble="lora", lora_rank=2)),
}


def groups(n: int, k: int, p: int = P, t: int = T) -> Rollouts:
    """Rollouts of which one of every group is empty, at different places of the groups."""
    batch = rollouts(n, k, p, t)
    row = np.arange(n * k)
    empty = row % k == (row // k + 1) % k
    return dataclasses.replace(batch, mask=batch.mask & ~empty[:, None])


def alone(batch: Rollouts) -> Rollouts:
    """The same rows, each a group of its own."""
    group = batch.group_size
    prompts = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), batch.prompts)
    return dataclasses.replace(batch, prompts=prompts)


def loss_and_grads(model, params, frozen=None):
    """(trainable, batch) -> ((loss, output), gradient), compiled."""

    def loss(trainable, batch):
        out = evaluate_completions(
            model, trainable, frozen or {}, batch, temperature=0.7, rows=None
        )
        leaves = jax.tree.leaves(out)
        return sum(jnp.mean(jnp.square(leaf)) for leaf in leaves), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def close(got, want, tolerance=1e-5):
    """Every leaf within a share of its largest number."""
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))

    def check(a, b):
        # Gradients that are sums to 0, such as that of the keys' bias without RoPE, are rounding.
        scale = max(float(jnp.abs(b).max()), 0.02 * largest)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)

    assert largest > 0
    jax.tree.map(check, got, want)


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_read_once_gives_the_numbers_and_gradients_of_one_per_sample(case):
    samples, options = CASES[case]
    model, params = tiny(**options)
    trainable, frozen = partition(params, model.config)
    batch = groups(3, samples)
    run = loss_and_grads(model, trainable, frozen)
    (_, got), grads = run(trainable, batch)
    (_, want), want_grads = run(trainable, alone(batch))
    close(got, want)
    close(grads, want_grads)


def test_layers_in_a_list_give_the_numbers_and_gradients_of_stacked_ones():
    model, params = tiny(**GEMMA)
    batch = groups(3, 2)
    (_, want), want_grads = loss_and_grads(model, params)(params, batch)
    apart = model.unstack(params)
    (_, got), grads = loss_and_grads(model, apart)(apart, batch)
    close(got, want)
    close(grads, model.unstack(want_grads))


def test_in_bfloat16_the_difference_is_of_its_rounding():
    model, params = tiny(param_dtype="bfloat16", compute_dtype="bfloat16", score_heads=HEADS)
    batch = groups(3, 4)
    evaluate = evaluator(model, None)
    got, want = (evaluate(params, {}, rows, 1.0) for rows in (batch, alone(batch)))
    close(got, want, 2**-8)


def test_samples_see_neither_each_other_nor_what_lies_in_padding():
    model, params = tiny(tie_embeddings=False, score_heads=HEADS)
    batch = groups(3, 4)
    tokens = jnp.where(batch.mask, batch.tokens % 100, 200)
    prompts = batch.prompts
    left = jnp.where(prompts.mask, prompts.tokens % 100, 200)
    batch = dataclasses.replace(
        batch, tokens=tokens, prompts=dataclasses.replace(prompts, tokens=left)
    )
    run = loss_and_grads(model, params)
    (_, want), want_grads = run(params, batch)
    poisoned = {**params, "embed": {"table": params["embed"]["table"].at[200].set(jnp.nan)}}
    (_, got), grads = run(poisoned, batch)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal, grads, want_grads)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((got, grads)))
    changed = dataclasses.replace(batch, tokens=tokens.at[0].add(1))  # full: no padding in it
    (_, got), _ = run(params, changed)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1:], b[1:]), got, want)
    assert not np.array_equal(got.logprobs[0], want.logprobs[0])


def test_embeddings_and_answers_are_those_of_rows_of_their_own():
    model, params = tiny()
    batch = groups(3, 4)
    question, answers = jnp.array([7, 8, 9]), jnp.array([1, 2])

    @jax.jit
    def read(batch):
        found = answer_logits(model, params, {}, batch, question, answers)
        return embed_completions(model, params, {}, batch), found

    close(read(batch), read(alone(batch)))


def test_a_prompt_is_paid_for_once(monkeypatch):
    """FLOPs of a pass are those of P + K·T columns, not of K·(P + T), where all are computed."""
    monkeypatch.setattr(passes, "MOST_LAYERS", 0)  # of the last layer the prompts' are left out
    model, params = tiny(lm_head=False, score_heads=("value",), width=256, mlp_width=512)
    k, p, t = 8, 24, 32

    def flops(batch):
        run = loss_and_grads(model, params)
        return run.lower(params, batch).compile().cost_analysis()["flops"]

    batch = rollouts(2, k, p, t)
    ratio = flops(batch) / flops(alone(batch))
    np.testing.assert_allclose(ratio, (p + k * t) / (k * (p + t)), rtol=0.05)


@pytest.mark.parametrize("layout", [{"data": 2, "tensor": 2}, {"fsdp": 4}])
def test_groups_stay_on_the_devices_of_their_rows(layout):
    model, params = tiny(score_heads=HEADS, window=4)
    batch = groups(4, 3)
    want = evaluator(model, None)(params, {}, batch, 0.7)
    mesh = make_mesh(layout)
    with jax.set_mesh(mesh):
        rows = shard_batch(mesh, model.rules, jax.tree.map(np.asarray, batch))
        run = evaluator(model, None).lower(replicate(params, mesh), {}, rows, 0.7).compile()
        out = run(replicate(params, mesh), {}, rows, 0.7)
    close(out, want)
    # What joins devices joins those of one shard of the batch.
    tensor, program = layout.get("tensor", 1), hlo.parse(run.as_text())
    joins = [
        line
        for lines in program.values()
        for line in lines
        if line.opcode.removesuffix("-start") in hlo.COLLECTIVES
    ]
    assert bool(joins) == (tensor > 1)
    for join in joins:
        for group in hlo.groups_of(join, 4):
            assert len({place // tensor for place in group}) == 1, join.line


def test_rows_that_are_no_groups_are_refused():
    model, params = tiny()
    with pytest.raises(ValueError, match="rows of 9 columns; wanted 4 of a prompt and a multiple"):
        model.apply(params, *plain(2, 9), None, Layout(4, 2))
