"""Faults seen in other codebases of this kind, each as a short test of what must hold here.

Many of them are proven in more depth beside the module that they are about; this is the list in
one place.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks.published_models import make, save
from rlhf_jax import roles
from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.data.examples import encode_row, pad_rows
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.completions import evaluate_completions
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.load import load_hf
from rlhf_jax.models.transformer import decoder
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.text.tokenizer import ByteTokenizer, CharTokenizer
from rlhf_jax.train_reward import train_reward
from rlhf_jax.training.experience import make_experience
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.types import CompletionOutput, Prompts, Scores, TokenTables
from tests.cards import card
from tests.models.load_test import KINDS, published, reference_logits, write_folder
from tests.training import tiny

ROOT = pathlib.Path(__file__).parents[1]
N, P, K, T = 3, 4, 4, 8
PAD, EOS = 0, 5


def tables(*ends: int, pad: int = PAD) -> TokenTables:
    ids = np.arange(tiny.VOCAB)
    visible = ~np.isin(ids, ends)
    return TokenTables(
        ends_text=~visible,
        ends_step=np.zeros(tiny.VOCAB, bool),
        text_before=visible,
        text_after=visible,
        pad=np.asarray(pad, np.int32),
    )


def prompts() -> Prompts:
    batch = tiny.rollouts(N, K, prompt_length=P, length=T).prompts
    return dataclasses.replace(batch, draw=np.zeros(N, np.int32))


class Policy:
    """A small random model, one sampler for all calls, and the trainer's log-probs."""

    def __init__(self):
        self.model = decoder(tiny.config(tie_embeddings=False))
        params = tiny.init(self.model, 0, tiny.one_device())
        # Distributions that are neither uniform nor certain.
        self.params = {**params, "unembed": {"kernel": params["unembed"]["kernel"] * 4}}
        self.run = jax.jit(
            lambda params, key, sampling, tables: generate(
                self.model,
                params,
                {},
                prompts(),
                key,
                samples=K,
                sampling=sampling,
                max_tokens=T,
                tables=tables,
                version=0,
            )
        )
        self.evaluate = jax.jit(
            lambda params, rollouts, temperature: (
                evaluate_completions(
                    self.model, params, {}, rollouts, temperature=temperature, rows=None
                ).logprobs
            )
        )

    def sample(self, ends=(EOS,), seed=0, step=0, pad=PAD, **sampling):
        key = step_key(seed, Purpose.SAMPLE, step)
        return self.run(self.params, key, make_sampling(**sampling), tables(*ends, pad=pad))

    def gap(self, rollouts, temperature):
        """|trainer − sampler| log-probs of the valid tokens, in nats."""
        logprobs = self.evaluate(self.params, rollouts, temperature)
        return np.abs(logprobs - rollouts.logprobs)[np.asarray(rollouts.mask)]


@pytest.fixture(scope="module")
def policy():
    return Policy()


def experience_of(outcome):
    batch = tiny.rollouts(2, 2, length=T)
    zeros = np.zeros(batch.tokens.shape, np.float32)
    scores = Scores(outcome=np.asarray(outcome, np.float32), process=zeros, parts={})
    output = CompletionOutput(logprobs=zeros, entropy=zeros, scores={"value": zeros})
    return make_experience(batch, scores, output, output, output, {})


def test_fractional_scores_reach_the_advantages():
    outcome = [0.3, -0.6, 0.05, 0.9]
    experience = experience_of(outcome)
    mask = np.asarray(experience.rollouts.mask)
    wanted = np.where(mask, np.asarray(outcome, np.float32)[:, None], 0)
    monte_carlo = ppo(gamma=1.0, lam=1.0, kl_coef=0.0, whiten=False)
    got = monte_carlo.targets(experience, 2, monte_carlo.init())[0]
    np.testing.assert_allclose(got.advantages, wanted, atol=1e-6)
    np.testing.assert_allclose(got.returns, wanted, atol=1e-6)
    relative = grpo(kl_coef=0.0, scale="none")
    got = relative.targets(experience, 2, relative.init())[0]
    wanted = np.array([0.45, -0.45, -0.425, 0.425])[:, None]
    np.testing.assert_allclose(got.advantages, np.where(mask, wanted, 0), atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rope_theta_of_the_checkpoint_changes_the_logits(kind, tmp_path):
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    found = {}
    for theta in (50.0, 1e6):
        published_config = {**KINDS[kind], "num_hidden_layers": 1, "rope_theta": theta}
        folder = write_folder(tmp_path / str(theta), published_config)
        config, params = load_hf(folder, tiny.one_device(), ShardingRules())
        model = decoder(config)
        ids = np.asarray(tokens)[None]
        out = model.apply(params, ids, np.arange(8)[None], ids >= 0, None)
        found[theta] = np.asarray(model.logits(params, out.hidden))[0]
        wanted = reference_logits(published_config, published(published_config), tokens)
        np.testing.assert_allclose(found[theta], wanted, atol=2e-5, rtol=2e-5)
    assert np.abs(found[50.0] - found[1e6]).max() > 0.05


def test_the_end_of_text_token_is_in_the_mask_and_trains(policy):
    rollouts = policy.sample()
    mask, tokens = np.asarray(rollouts.mask), np.asarray(rollouts.tokens)
    ended = ~np.asarray(rollouts.truncated)
    assert 0 < ended.sum() < N * K
    last = mask.sum(axis=1) - 1
    rows = np.flatnonzero(ended)
    assert (tokens[rows, last[rows]] == EOS).all()
    assert not (tokens[mask & (np.arange(T) != last[:, None])] == EOS).any()
    assert (np.asarray(rollouts.logprobs)[rows, last[rows]] < 0).all()

    # The loss has a gradient there, and only where the mask is.
    zeros = jnp.zeros((N * K, T))
    output = CompletionOutput(logprobs=rollouts.logprobs, entropy=zeros, scores={"value": zeros})
    scores = Scores(outcome=jnp.arange(N * K) / 7.0, process=zeros, parts={})
    experience = make_experience(rollouts, scores, output, output, output, {})
    algorithm = ppo(kl_coef=0.0)
    targets, _ = algorithm.targets(experience, K, algorithm.init())

    def loss(logprobs):
        terms, _ = algorithm.loss(
            dataclasses.replace(output, logprobs=logprobs), experience, targets, K
        )
        return terms["policy"].mean.total

    gradient = np.asarray(jax.grad(loss)(rollouts.logprobs))
    assert (np.abs(gradient[rows, last[rows]]) > 1e-3).all()
    assert (gradient[~mask] == 0).all()


def test_the_end_of_text_token_is_in_supervised_rows():
    text = CharTokenizer("ab=")
    rows = pad_rows([encode_row(text, "a=", "b")], 6, text.pad_id)
    assert rows.tokens[0].tolist() == [2, 4, 3, text.eos_ids[0], 0, 0]
    assert rows.loss_mask[0].tolist() == [False, False, True, True, False, False]


def test_end_of_text_ids_change_between_calls_of_one_program(policy):
    free = np.asarray(policy.sample(ends=()).tokens)
    programs = policy.run._cache_size()
    for ends in ((EOS,), (7,), (2, 9)):
        rollouts = policy.sample(ends=ends)
        stops = np.isin(free, ends)
        length = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, T)
        np.testing.assert_array_equal(rollouts.mask, np.arange(T) < length[:, None])
        assert length.min() < T
    assert policy.run._cache_size() == programs


def test_steps_and_seeds_differ_and_repeat(policy):
    drawn = [policy.sample(seed=seed, step=step) for seed in (0, 1) for step in (0, 1)]
    tokens = [np.asarray(rollouts.tokens) for rollouts in drawn]
    for i, one in enumerate(tokens):
        assert all((one != other).mean() > 0.2 for other in tokens[:i])
    np.testing.assert_array_equal(policy.sample(seed=1, step=0).tokens, tokens[2])
    # Nor are the samples of one prompt alike, unless that is asked for.
    groups = tokens[0].reshape(N, K, T)
    assert all(len(np.unique(group, axis=0)) == K for group in groups)
    greedy = np.asarray(policy.sample(temperature=0.0).tokens).reshape(N, K, T)
    assert all(len(np.unique(group, axis=0)) == 1 for group in greedy)


def test_the_trainer_knows_the_sampling_temperature(policy):
    rollouts = policy.sample(temperature=0.7)
    assert policy.gap(rollouts, 0.7).max() < 1e-4
    assert policy.gap(rollouts, 1.0).max() > 0.1


def test_a_sampled_pad_id_is_a_token_like_any_other(policy):
    pad = int(np.bincount(np.asarray(policy.sample(ends=()).tokens).ravel()).argmax())
    rollouts = policy.sample(ends=(), pad=pad)  # the commonest token
    pads = np.asarray(rollouts.tokens) == pad
    assert pads[:, :-1].any() and np.asarray(rollouts.mask).all()
    assert policy.gap(rollouts, 1.0).max() < 1e-4
    # Telling padding by its id would show.
    by_id = dataclasses.replace(rollouts, mask=jnp.asarray(~pads))
    assert policy.gap(by_id, 1.0).max() > 1e-3


def test_new_sampling_values_never_compile_again(policy):
    policy.sample()
    policy.sample(top_p=0.9)
    assert policy.run._cache_size() == 2  # with and without truncation, whatever the values
    for temperature in (0.0, 0.3, 1.7):
        policy.sample(temperature=temperature, ends=(1, 2))
        policy.sample(temperature=temperature, top_p=0.5, top_k=3, ends=())
    assert policy.run._cache_size() == 2


def test_a_prompt_over_the_limit_is_an_error_that_names_it():
    records = [{"question": "ab"}, {"question": "abcdefgh"}]
    with pytest.raises(ValueError, match=r"source 0, record 1 has 8 tokens but max_prompt=6"):
        PromptSource([records], ByteTokenizer(), template="{question}", max_prompt=6, seed=0)


def test_the_cache_has_the_columns_that_are_needed(policy):
    columns = []

    def shapes(held):
        return {(x.shape[0], x.shape[2]) for x in (*held.keys, *held.values)}

    def apply(params, tokens, positions, mask, cache, **options):
        prefix = cache.prefix and shapes(cache.prefix)
        columns.append((tokens.shape[1], shapes(cache), prefix))
        return policy.model.apply(params, tokens, positions, mask, cache, **options)

    jax.eval_shape(
        lambda key: generate(
            policy.model._replace(apply=apply),
            policy.params,
            {},
            prompts(),
            key,
            samples=K,
            sampling=make_sampling(),
            max_tokens=T,
            tables=tables(EOS),
            version=0,
        ),
        jax.random.key(0),
    )
    # The prompts alone, once for all samples; then one column of each sample per token that is
    # read: the last one drawn is not.
    assert columns[0] == (P, {(N, P)}, None)
    assert len(columns) > 1
    assert all(call == (1, {(N * K, T - 1)}, {(N, P)}) for call in columns[1:])


def reward_config(folder: pathlib.Path, data: pathlib.Path) -> ConfigDict:
    pairs = dict(
        kind="pairs", name=f"jsonl:{data}", template="{prompt}", max_length=8, rows=8, weight=1.0
    )
    return ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1),
            model=dict(init_from=str(folder)),
            reward=dict(score_heads=("outcome",)),
            card=card("pairs"),
            data=dict(tokenizer="chars:0123456789+="),
            sources=dict(pairs=pairs),
            optimizer=dict(learning_rate=1e-2, schedule="constant", warmup=0),
            updates=dict(microbatches=1),
            train=dict(steps=6, max_skipped=1),
            eval=dict(every=100, sources=dict()),
            checkpoint=dict(every=100, keep=1),
            log=dict(every=1),
        )
    )


# Three that differ most; the others' forward pass is held by tests/models and conformance tests.
@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("gemma3_text", "llama") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in sorted(FAMILIES)
    ],
)
def test_a_reward_model_trains_on_every_family(kind, tmp_path):
    folder = save(make(kind.removesuffix("_text"), seed=1), tmp_path / "published")
    data = tmp_path / "pairs.jsonl"
    rows = [dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(i)) for i in range(8)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    workdir = tmp_path / "run"
    state = train_reward(reward_config(folder, data), str(workdir))
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss/pairs"] < 0.7 * metrics[0]["loss/pairs"]
    # The head that was learnt is what a policy run would load.
    mesh = make_mesh({"data": -1})
    head = roles.load(str(workdir), mesh, ShardingRules())["heads"]["outcome"]
    trained = state.train.params["reward"]["heads"]["outcome"]
    np.testing.assert_array_equal(head["kernel"], trained["kernel"])
    assert np.abs(np.asarray(head["kernel"])).max() > 0


def test_prompts_of_the_wrong_type_are_named():
    messages = [{"question": [{"role": "user", "content": "1+1?"}]}]
    with pytest.raises(ValueError, match=r"source 0, record 0: .*'question' holds list"):
        PromptSource([messages], ByteTokenizer(), template="{question}", max_prompt=99, seed=0)


# Runs without the type checker of the tests, as a user's program does.
BARE = """
import importlib.machinery, pkgutil, sys

class Base(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {absent!r}
        return None if hidden else super().find_spec(name, path, target)

plain = importlib.machinery.PathFinder
sys.meta_path[:] = [Base if finder is plain else finder for finder in sys.meta_path]
import rlhf_jax
names = [m.name for m in pkgutil.walk_packages(rlhf_jax.__path__, "rlhf_jax.")]
for name in names:
    importlib.import_module(name)
print(len(names), sorted({{"tensorflow", "torch"}} & set(sys.modules)))

from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.text.tokenizer import ByteTokenizer

def error_of(call):
    try:
        call()
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)

error_of(lambda: generate(
    None, {{}}, {{}}, ["1+1?"], None, samples=1, sampling=None, max_tokens=1, tables=None, version=0
))
error_of(lambda: PromptSource(
    [["1+1?"]], ByteTokenizer(), template="{{question}}", max_prompt=9, seed=0
))
"""
# All that setup.py lists under extras, and what an extra of a dependency would bring.
ABSENT = (
    *("beartype", "ipykernel", "nbclient", "pytest", "sentencepiece"),
    *("tensorflow", "torch"),
)


def test_every_module_imports_with_the_base_requirements():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BARE.format(absent=ABSENT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules, one, other = done.stdout.strip().splitlines()
    count, loaded = modules.split(" ", 1)
    assert int(count) >= 60 and loaded == "[]"
    # And prompts that are plain text get an answer that says what is wanted.
    assert one.startswith("TypeError prompts is a list; wanted types.Prompts")
    assert other.startswith("ValueError source 0, record 0: the record is a str")
