import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import decoder
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.text.steps import mark_step_ends
from rlhf_jax.types import Prompts, TokenTables

CONFIG = ModelConfig(
    vocab_size=12,
    width=20,  # not the number of rows: shapes below tell weights from activations
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=24,
    tie_embeddings=False,
)
PAD, EOS, BREAK = 0, 3, 5
N, P, K, T = 4, 6, 4, 10


@functools.cache
def make_model(seed=0, **changes):
    """A random model whose distributions are neither uniform nor certain."""
    model = decoder(dataclasses.replace(CONFIG, **changes))
    return model, jax.jit(model.init)(jax.random.key(seed))


def make_tables(eos=(EOS,)):
    ids = np.arange(CONFIG.vocab_size)
    visible = ~np.isin(ids, (PAD, BREAK, *eos))
    return TokenTables(
        ends_text=np.isin(ids, eos),
        ends_step=ids == BREAK,
        text_before=visible,
        text_after=visible,
        pad=np.asarray(PAD, np.int32),
    )


def make_prompts(n=N, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.array([P, 1, 3, 4, 2, 5, 6, 2])[:n]
    return Prompts(
        tokens=rng.integers(0, CONFIG.vocab_size, (n, P)).astype(np.int32),
        mask=np.arange(P) >= P - lengths[:, None],
        record=np.arange(10, 10 + n, dtype=np.int32),
        source=np.zeros(n, np.int32),
        draw=np.zeros(n, np.int32),
    )


def rows_of(prompts, index):
    return jax.tree.map(lambda x: x[index], prompts)


def jitted(model, samples=K, max_tokens=T, mesh=None, frozen=None):
    """generate with positional traced arguments, so that the compiled programs can be counted."""

    @jax.jit
    def run(params, prompts, key, sampling, tables, version):
        return generate(
            model,
            params,
            {} if frozen is None else frozen,
            prompts,
            key,
            samples=samples,
            sampling=sampling,
            max_tokens=max_tokens,
            tables=tables,
            version=version,
            mesh=mesh,
        )

    return run


@functools.cache
def shared():
    """One model and one compiled sampler for all tests that need no other."""
    model, params = make_model()
    return model, params, jitted(model)


def arguments(params, key=0, prompts=None, tables=None, **values):
    return (
        params,
        make_prompts() if prompts is None else prompts,
        jax.random.key(key),
        make_sampling(**values),
        make_tables() if tables is None else tables,
        np.int32(7),
    )


def sample(key=0, prompts=None, tables=None, **values):
    _, params, run = shared()
    return run(*arguments(params, key, prompts, tables, **values))


@functools.cache
def trainer():
    model, params, _ = shared()

    @jax.jit
    def evaluate(rollouts, temperature):
        return evaluate_completions(
            model, params, {}, rollouts, temperature=temperature, rows=2 * K
        )

    return evaluate


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_trainer_pads_included(temperature):
    gaps = []
    for key in range(4):
        rollouts = sample(key, temperature=temperature)
        # Pads are drawn as ordinary tokens: only the mask says what is padding.
        assert ((np.asarray(rollouts.tokens) == PAD) & rollouts.mask)[:, :-1].any()
        assert (np.asarray(rollouts.logprobs)[np.asarray(rollouts.mask)] < -0.1).any()
        logprobs = trainer()(rollouts, temperature).logprobs
        gaps.append(np.abs(logprobs - rollouts.logprobs)[np.asarray(rollouts.mask)])
        np.testing.assert_array_equal(rollouts.behaviour_logprobs, rollouts.logprobs)
    gaps = np.concatenate(gaps)
    assert gaps.mean() < 1e-5
    assert gaps.max() < 1e-4


def test_truncation_changes_behaviour_logprobs_only():
    rollouts = sample(temperature=0.9, top_k=4, top_p=0.9)
    mask = np.asarray(rollouts.mask)
    logprobs = trainer()(rollouts, 0.9).logprobs
    np.testing.assert_allclose(logprobs, rollouts.logprobs, atol=1e-4)
    gap = (rollouts.behaviour_logprobs - rollouts.logprobs)[mask]
    assert (gap > -1e-6).all()
    assert gap.max() > 0.01


def test_mask_ends_with_the_end_of_text_token():
    rollouts = sample(1)
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    truncated = np.asarray(rollouts.truncated)
    assert 0 < truncated.sum() < N * K
    for row, valid, cut in zip(tokens, mask, truncated, strict=True):
        ends = np.flatnonzero(row == EOS)
        length = T if cut else ends[0] + 1
        assert cut == (len(ends) == 0)
        np.testing.assert_array_equal(valid, np.arange(T) < length)
        assert (row[length:] == PAD).all()
    assert (np.asarray(rollouts.logprobs)[~mask] == 0).all()
    assert (np.asarray(rollouts.behaviour_logprobs)[~mask] == 0).all()
    np.testing.assert_array_equal(rollouts.sample, np.tile(np.arange(K), N))
    np.testing.assert_array_equal(rollouts.version, np.full(N * K, 7))
    ends = mark_step_ends(rollouts.tokens, rollouts.mask, make_tables())
    np.testing.assert_array_equal(rollouts.step_ends, ends)
    assert_equal(rollouts.prompts, make_prompts())


def test_greedy_is_the_argmax_of_full_passes():
    model, params, _ = shared()
    prompts = make_prompts()
    got = np.asarray(sample(temperature=0.0).tokens).reshape(N, K, T)

    @jax.jit
    def best_next(ids, length):  # one shape for all lengths; padded on the right
        positions = jnp.arange(P + T)[None]
        out = model.apply(params, ids, positions, positions < length, None)
        return jnp.argmax(model.logits(params, out.hidden)[0, length - 1])

    for row in range(N):
        text = prompts.tokens[row][prompts.mask[row]].tolist()
        wanted = []
        while len(wanted) < T and EOS not in wanted:
            ids = np.zeros((1, P + T), np.int32)
            ids[0, : len(text)] = text
            wanted.append(int(best_next(ids, len(text))))
            text.append(wanted[-1])
        wanted += [PAD] * (T - len(wanted))
        for completion in got[row]:  # all samples of a group alike
            np.testing.assert_array_equal(completion, wanted)


def test_a_rows_place_in_the_batch_is_bit_exact():
    order = np.array([2, 0, 3, 1])
    one = sample(5)
    other = sample(5, prompts=rows_of(make_prompts(), order))
    expanded = (order[:, None] * K + np.arange(K)).ravel()
    for name in ("tokens", "mask", "step_ends", "logprobs", "truncated", "sample"):
        np.testing.assert_array_equal(
            np.asarray(getattr(one, name))[expanded], getattr(other, name)
        )


def test_a_row_depends_neither_on_the_batch_nor_on_the_number_of_samples():
    model, params, _ = shared()
    whole = sample(2)
    alone = jitted(model, samples=2)
    for row in (0, 3):
        prompts = rows_of(make_prompts(), slice(row, row + 1))
        got = alone(*arguments(params, 2, prompts))
        own = slice(row * K, row * K + 2)
        np.testing.assert_array_equal(np.asarray(whole.tokens)[own], got.tokens)
        np.testing.assert_allclose(np.asarray(whole.logprobs)[own], got.logprobs, atol=1e-4)


def test_keys_records_draws_and_samples_differ():
    tokens = np.asarray(sample(0).tokens)
    assert not np.array_equal(tokens, sample(1).tokens)
    same = rows_of(make_prompts(), np.zeros(N, int))  # one prompt four times
    for name in ("record", "draw", "source"):
        marked = dataclasses.replace(same, **{name: np.arange(N, dtype=np.int32)})
        completions = np.asarray(sample(0, prompts=marked).tokens)
        assert len(np.unique(completions, axis=0)) == N * K
    again = np.asarray(sample(0, prompts=same).tokens).reshape(N, K, T)
    for group in again[1:]:
        np.testing.assert_array_equal(group, again[0])


def test_what_lies_under_prompt_padding_changes_nothing():
    prompts = make_prompts()
    other = np.where(prompts.mask, prompts.tokens, (prompts.tokens + 5) % CONFIG.vocab_size)
    assert not np.array_equal(other, prompts.tokens)
    one = sample(3)
    two = sample(3, prompts=dataclasses.replace(prompts, tokens=other.astype(np.int32)))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.logprobs, two.logprobs)


def test_end_of_text_ids_are_not_baked_in():
    free = np.asarray(sample(1, tables=make_tables(())).tokens)
    for eos in ((EOS,), (7,), (2, 8)):
        rollouts = sample(1, tables=make_tables(eos))
        ends = np.isin(free, eos)
        length = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, T)
        mask = np.arange(T) < length[:, None]
        assert 0 < mask.sum() < mask.size
        np.testing.assert_array_equal(rollouts.mask, mask)
        np.testing.assert_array_equal(rollouts.tokens, np.where(mask, free, PAD))


def test_new_values_never_compile_again():
    _, params, run = shared()
    sample(top_k=3)
    sample()
    programs = run._cache_size()
    assert programs == 2  # with and without truncation
    for eos, values in (
        ((1, 2), dict(temperature=0.3, top_k=5)),
        ((), dict(temperature=0.0, top_p=0.5)),
        ((EOS,), dict(temperature=1.3, min_p=0.1, top_p=0.9)),
        ((EOS,), dict(temperature=0.5)),
    ):
        *others, tables, _ = arguments(params, 0, None, make_tables(eos), **values)
        tables = dataclasses.replace(tables, pad=np.asarray(9, np.int32))
        rollouts = run(*others, tables, np.int32(len(eos)))
        np.testing.assert_array_equal(rollouts.version, np.full(N * K, len(eos)))
        assert (np.asarray(rollouts.tokens)[~np.asarray(rollouts.mask)] == 9).all()
    assert run._cache_size() == programs


def test_samples_follow_the_models_distribution():
    model, params = make_model(seed=2)
    samples = 6000
    run = jitted(model, samples=samples, max_tokens=2)
    prompts = rows_of(make_prompts(), slice(0, 1))
    rollouts = run(*arguments(params, 0, prompts, make_tables(())))
    tokens = np.asarray(rollouts.tokens)

    @jax.jit
    def following(ids):
        positions = jnp.arange(ids.shape[1])[None]
        out = model.apply(params, ids, positions, positions >= 0, None)
        return jax.nn.softmax(model.logits(params, out.hidden)[0, -1])

    first = np.asarray(following(prompts.tokens))
    # The second token, given the most frequent first one, by the model on the longer text.
    best = int(first.argmax())
    longer = np.concatenate([prompts.tokens, np.array([[best]], np.int32)], axis=1)
    second = np.asarray(following(longer))
    for drawn, p in ((tokens[:, 0], first), (tokens[tokens[:, 0] == best, 1], second)):
        counts = np.bincount(drawn, minlength=CONFIG.vocab_size)
        expected = len(drawn) * p
        assert expected.min() > 5
        # 31.26 is the 99.9 % point of χ² with 11 degrees of freedom.
        assert np.sum((counts - expected) ** 2 / expected) < 31.26


def test_adapters_are_sampled_as_they_are_trained():
    model, params = make_model(lora_rank=3)
    trainable, frozen = partition(params, model.config)
    rng = np.random.default_rng(9)  # fresh adapters change nothing
    trainable = jax.tree.map(
        lambda x: np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(np.float32), trainable
    )
    rollouts = jitted(model, frozen=frozen)(*arguments(trainable))
    logprobs = jax.jit(
        lambda rollouts: (
            evaluate_completions(
                model, trainable, frozen, rollouts, temperature=1.0, rows=None
            ).logprobs
        )
    )(rollouts)
    np.testing.assert_allclose(logprobs, rollouts.logprobs, atol=1e-4)
    plain = sample(0)
    assert not np.array_equal(plain.tokens, rollouts.tokens)


@pytest.mark.parametrize("changes", [{"max_tokens": 0}, {"samples": 0}])
def test_nothing_to_sample_is_refused(changes):
    model, params, _ = shared()
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name}=0"):
        jitted(model, **changes)(*arguments(params))


def test_one_token_completions():
    model, params, _ = shared()
    rollouts = jitted(model, max_tokens=1)(*arguments(params))
    np.testing.assert_array_equal(rollouts.tokens, np.asarray(sample(0).tokens)[:, :1])
    assert np.asarray(rollouts.mask).all()
