"""PPO with a learned outcome model on a real pretrained model: it learns, and still tells stories.

stories260K writes the beginnings of children's stories. The rule to be learnt, from preferences
between its own samples, is that a story mentions a mother; about one in eight does so by itself.
"""

import dataclasses
import json
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import stories260k as stories
from configs.quickstart import get_config
from rlhf_jax import policy_run
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.policy_run import PolicyRun
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.train_policy import train_policy
from rlhf_jax.train_reward import train_reward
from rlhf_jax.types import Rollouts, RunState
from tests.cards import card

pytestmark = pytest.mark.data

TEMPLATE = "<s>{prompt}"  # the model begins every story with its token 1
BEGINNINGS = (
    "Once upon a time, there was a little girl named Lily.",
    "Once upon a time, there was a little boy named Tim.",
    "One day, a girl was in the garden.",
    "There was a big dog who liked to run.",
)
MAX_PROMPT = 24  # tokens
STEPS = 20
MOTHER = re.compile(r"\b(mom|mommy|mother)\b", re.IGNORECASE)


class Size(NamedTuple):
    """How much is sampled and trained; what is asserted is the same."""

    completion: int  # tokens
    draws: int  # batches of 32 samples from which preferences are made
    pairs: int  # per step of the reward model
    reward_steps: int
    samples: int  # per prompt in each PPO step


SHORT = Size(completion=32, draws=8, pairs=16, reward_steps=14, samples=4)
LONG = Size(completion=64, draws=16, pairs=32, reward_steps=40, samples=8)


class Samples(NamedTuple):
    """What a policy wrote, with the initial model's mean log-prob of a token, in nats."""

    texts: list[str]
    prompts: list[str]
    logprob: float


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    source = data_dir / "tiny_models" / "stories260K"
    return stories.convert(source, tmp_path_factory.mktemp("stories"))


def write_lines(path: pathlib.Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return f"jsonl:{path}"


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def stage(name: str, folder: pathlib.Path, size: Size) -> ConfigDict:
    """The quickstart's config of one stage, starting from the pretrained model."""
    config = get_config("small").stages[name].config
    config.unlock()
    config.model = dict(init_from=str(folder))
    config.data = dict(tokenizer=str(folder))
    config.checkpoint.every, config.log.every = 1000, 1
    if name == "policy":
        config.rollout.prompts, config.rollout.samples = 8, size.samples
        config.rollout.max_tokens = size.completion
        config.data.update(
            name=write_lines(folder / "prompts.jsonl", [dict(prompt=t) for t in BEGINNINGS]),
            split="train",
            data_dir="",
            options={},
            template=TEMPLATE,
            max_prompt=MAX_PROMPT,
            overlong="error",
        )
    return config


def sampling_run(folder: pathlib.Path, size: Size) -> tuple[PolicyRun, RunState]:
    """A run of the same sizes that never trains, at the pretrained model."""
    config = stage("policy", folder, size)
    config.rewards = dict(length=dict(name="length", weight=1.0, per_token=1.0, free=0))
    config.value.init_from = "policy"
    return policy_run.start(make_plan(config))


def sample(run: PolicyRun, state: RunState, draws: range, change=lambda rollouts: rollouts):
    """One batch per draw of the policy in `state`, changed, then read by the initial model."""
    texts, prompts, logprobs = [], [], []
    with jax.set_mesh(run.plan.mesh):
        for draw in draws:
            rollouts = change(run.sample(state, 8 * draw, jax.random.key(draw)))
            _, reference, _ = run.steps.evaluate(state.train.params, run.frozen(state), rollouts)
            mask = np.asarray(rollouts.mask)
            logprobs.append(np.asarray(reference.logprobs)[mask])
            rows = zip(np.asarray(rollouts.tokens), mask, strict=True)
            texts += [run.plan.tokenizer.decode(tokens[valid]) for tokens, valid in rows]
            asked = np.repeat(np.asarray(rollouts.prompts.record), rollouts.group_size)
            prompts += [BEGINNINGS[record] for record in asked]
    return Samples(texts, prompts, float(np.concatenate(logprobs).mean()))


def backwards(rollouts: Rollouts) -> Rollouts:
    """The same tokens in the opposite order: no stories any more."""
    return dataclasses.replace(rollouts, tokens=rollouts.tokens[:, ::-1])


def mothers(texts: list[str]) -> float:
    """The share of texts that follow the rule."""
    return sum(MOTHER.search(text) is not None for text in texts) / len(texts)


def words(texts: list[str]) -> list[str]:
    """All words but the last of each text, which may be cut off."""
    return [word for text in texts for word in re.findall(r"[a-z']+", text.lower())[:-1]]


def known_words(texts: list[str], vocabulary: set[str]) -> float:
    """The share of words that are in a vocabulary."""
    found = words(texts)
    return sum(word in vocabulary for word in found) / len(found)


def preferences(samples: Samples) -> list[dict]:
    """Of two samples of one beginning, the one with a mother is chosen."""
    records = []
    for prompt in BEGINNINGS:
        own = [t for t, p in zip(samples.texts, samples.prompts, strict=True) if p == prompt]
        good = [text for text in own if MOTHER.search(text)]
        bad = [text for text in own if not MOTHER.search(text)]
        for i in range(len(own) if good and bad else 0):
            records.append(
                dict(prompt=prompt, chosen=good[i % len(good)], rejected=bad[i % len(bad)])
            )
    return records


def train_outcome_model(folder, size: Size, records: list[dict], workdir: pathlib.Path) -> float:
    """Trains it; returns its accuracy on the pairs of the last steps."""
    workdir.mkdir()
    config = stage("reward", folder, size)
    config.reward.score_heads = ("outcome",)
    pairs = dict(
        kind="pairs",
        name=write_lines(folder / "pairs.jsonl", records),
        split="train",
        template=TEMPLATE,
        # Cut before end-of-text: what the policy samples is cut too, and scored at its end.
        max_length=MAX_PROMPT + size.completion - 8,
        overlong="truncate",
        weight=1.0,
        rows=size.pairs,
    )
    config.sources, config.card = dict(pairs=pairs), card("pairs")
    config.optimizer.learning_rate = 1e-3
    config.train.steps = size.reward_steps
    train_reward(config, str(workdir))
    return np.mean([row["pairs/accuracy"] for row in read_metrics(workdir)[-4:]])


def policy_config(folder: pathlib.Path, size: Size, reward: pathlib.Path) -> ConfigDict:
    config = stage("policy", folder, size)
    learned = dict(name="outcome_model", weight=1.0, init_from=str(reward), head="outcome")
    config.rewards = dict(learned=learned | dict(normalise=True, clip=3.0))
    config.value.init_from = "learned"
    config.algorithm.kl_coef = 0.1
    config.optimizer.policy.learning_rate = 5e-4
    config.train.steps = STEPS
    return config


def test_the_beginning_token_is_written_in_the_template(folder):
    tokenizer = load_tokenizer(str(folder))
    tokens = tokenizer.encode(TEMPLATE.format(prompt="Once upon a time"))
    assert tokens == [stories.BOS, *tokenizer.encode("Once upon a time")]
    assert tokenizer.decode(tokens) == "Once upon a time"


@pytest.mark.slow
@pytest.mark.parametrize("size", [SHORT, LONG])
def test_ppo_with_a_learned_reward_still_tells_stories(size, folder, tmp_path):
    run, initial = sampling_run(folder, size)
    before = sample(run, initial, range(size.draws))
    accuracy = train_outcome_model(folder, size, preferences(before), tmp_path / "reward")
    assert accuracy > 0.8
    config = policy_config(folder, size, tmp_path / "reward")
    state = train_policy(config, str(tmp_path / "policy"))
    rows = read_metrics(tmp_path / "policy")
    after = sample(run, state, range(2))

    # It learnt: what the reward model says, and the rule that nobody told the policy.
    scores = [row["objective/score"] for row in rows]
    assert len(rows) == STEPS
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.3, scores
    assert mothers(after.texts) > mothers(before.texts) + 0.2

    # They are stories: likely under the initial model, and made of its words, not of a few.
    control = sample(run, initial, range(2), change=backwards)
    assert control.logprob < before.logprob - 2
    assert abs(after.logprob - before.logprob) < 0.4
    assert max(row["objective/kl_ref"] for row in rows) < 0.5 * size.completion
    held_out = len(after.texts)
    vocabulary = set(words(before.texts[held_out:]))
    own = known_words(before.texts[:held_out], vocabulary)
    assert known_words(control.texts, vocabulary) < own - 0.2
    assert known_words(after.texts, vocabulary) > own - 0.1
    different = [len(set(words(texts))) for texts in (before.texts[:held_out], after.texts)]
    assert different[1] > 0.5 * different[0]
