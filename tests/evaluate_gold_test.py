"""Labels and evaluation by a reward that needs no model, on a run of random weights."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.stories import get_config
from rlhf_jax.evaluate_gold import Found, evaluate_gold, numbers_of
from rlhf_jax.label_samples import label_samples
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.train_sft import train_sft
from rlhf_jax.training.keys import Purpose

ALPHABET = "ab \n"  # a random model writes the word "a" often enough
PROMPTS = ("a", "ab", "ba", "b")
GOLD = dict(name="keywords", words=("a", "b"), limit=2)


def changed(stage, policy, **fields):
    """A stage of the stories config on a vocabulary of letters, for the policy of a folder."""
    config = ConfigDict(get_config().stages[stage].config.to_dict())
    config.data.update(
        options=dict(prompt=PROMPTS),
        template="{prompt}",
        max_prompt=2,
        tokenizer="chars:" + ALPHABET,
    )
    config.rollout.update(prompts=4, samples=8, max_tokens=8)
    for name, value in fields.items():
        config[name] = value
    if stage == "evaluation":
        config.policies = dict(before=dict(init_from=policy), after=dict(init_from=policy))
    else:
        config.model.init_from = policy
    return config


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a run of one step."""
    texts = dict(
        kind="texts",
        name="inline",
        options=dict(answer=("a b", "b a")),
        template="",
        max_length=8,
        weight=1.0,
        rows=4,
    )
    run = get_config().stages.reward.config.to_dict()
    config = ConfigDict(
        {name: run[name] for name in ("seed", "checkpoint", "log", "optimizer")}
        | dict(
            mesh=dict(data=-1),
            model=dict(name="tiny", layers=1, init_from=""),
            data=dict(tokenizer="chars:" + ALPHABET),
            sources=dict(texts=texts),
            updates=dict(microbatches=1),
            train=dict(steps=1, max_skipped=1),
            eval=dict(every=1, sources=dict()),
        )
    )
    config.optimizer.warmup = 0
    folder = tmp_path_factory.mktemp("policy")
    train_sft(config, str(folder))
    return str(folder)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_by_any_reward(policy, tmp_path):
    label = dict(problems=4, held_out=0.25, pairs=4, reward=GOLD, margin=0.0)
    summary = label_samples(changed("labels", policy, label=label), str(tmp_path))
    scores, pairs = (read_lines(tmp_path / f"{name}.jsonl") for name in ("scores", "pairs"))
    assert summary["rows/scores"] == len(scores) == 24
    assert summary["rows/held_out_scores"] == 8
    assert summary["score"] == pytest.approx(np.mean([row["score"] for row in scores]))
    for row in scores:  # the rule, anew
        assert row["score"] == len({"a", "b"} & set(row["completion"].split())) / 2
    known = {row["completion"]: row["score"] for row in scores}
    assert pairs and all(known[p["chosen"]] > known[p["rejected"]] for p in pairs)
    held_out = {row["prompt"] for row in read_lines(tmp_path / "held_out_scores.jsonl")}
    assert len(held_out) == 1 and not held_out & {row["prompt"] for row in scores}


def test_a_sampler_reads_its_own_samples_as_it_wrote_them(policy):
    config = changed("evaluation", policy, problems=3)
    config.model.init_from = policy
    sampler = PolicySampler(config, Purpose.EVALUATE)
    batches = list(sampler.batches(3))
    assert [first for first, _ in batches] == [0]
    rollouts = batches[0][1]
    np.testing.assert_allclose(sampler.logprobs(rollouts), rollouts.logprobs, atol=1e-5)
    # The last batch is whole; groups are of the problems that were asked for.
    assert len(sampler.decode(rollouts)) == 4 and len(list(sampler.groups(3))) == 3


def test_a_policy_gains_nothing_over_itself_and_stays_where_it_is(policy, tmp_path):
    config = changed("evaluation", policy, gold=GOLD, problems=4)
    numbers = evaluate_gold(config, str(tmp_path))
    assert numbers["after/gold"] == numbers["before/gold"] > 0
    for name in ("after/gold_gain", "after/kl"):
        assert numbers[name] == numbers[f"{name}_low"] == numbers[f"{name}_high"] == 0.0
    rows = read_lines(tmp_path / "evaluation.jsonl")
    assert len(rows) == 2 * 4 * 8
    before = [row["gold"] for row in rows if row["stage"] == "before"]
    assert numbers["before/gold"] == pytest.approx(np.mean(before))
    assert json.loads((tmp_path / "summary.json").read_text())["after/kl"] == 0.0


@pytest.mark.parametrize("sampling", [dict(temperature=0.7), dict(top_k=2), dict(min_p=0.1)])
def test_samples_that_are_not_the_policys_own_measure_no_kl(sampling, policy, tmp_path):
    config = changed("evaluation", policy, gold=GOLD, problems=4)
    config.rollout.sampling.update(sampling)
    numbers = evaluate_gold(config, str(tmp_path))
    assert "after/gold_gain" in numbers and "after/kl" not in numbers


def test_intervals_are_over_prompts_and_the_gain_is_paired():
    zeros = np.zeros((3, 2), np.float32)
    before = Found([], np.float32([[0, 1], [1, 1], [0, 0]]), zeros + 4, zeros)
    after = Found([], before.gold + 0.5, zeros + 5, zeros + 2)
    numbers = numbers_of({"before": before, "after": after}, "before")
    assert numbers["before/gold"] == 0.5
    # Student's t with two degrees of freedom.
    assert numbers["before/gold_high"] == pytest.approx(0.5 + 4.302653 * 0.5 / np.sqrt(3))
    # Every prompt gained as much: the prompts' differences do not blur it.
    gain = [numbers[f"after/gold_gain{end}"] for end in ("", "_low", "_high")]
    assert gain == [0.5, 0.5, 0.5]
    assert (numbers["after/kl"], numbers["after/length"]) == (2.0, 5.0)
    assert "before/kl" not in numbers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(reference="sft"), "reference='sft'; wanted one of policies: after, before"),
        (dict(problems=1), "problems=1; wanted 2 or more"),
        (dict(problems=5), "problems=5 but data has 4"),
        (dict(gold=dict(words=("a",))), "gold.name is missing"),
        (dict(gold=dict(name="outcome_model")), "gold.name='outcome_model' is a learned reward"),
        (dict(gold=dict(GOLD, word=1)), "gold.*word"),
    ],
)
def test_bad_input_of_the_evaluation_is_named(fields, message, policy, tmp_path):
    config = changed("evaluation", policy, **(dict(problems=4) | fields))
    with pytest.raises(ValueError, match=message):
        evaluate_gold(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(held_out=1.0), "label.held_out=1.0"),
        (dict(margin=-1.0), "label.margin=-1.0"),
        (dict(reward=dict(name="process_model")), "label.reward.name='process_model' is a learned"),
        (dict(reward=None), "set label.reward"),
    ],
)
def test_bad_input_of_the_labels_is_named(changes, message, policy, tmp_path):
    label = dict(problems=4, held_out=0.0, pairs=4, reward=GOLD, margin=0.0) | changes
    label = {name: value for name, value in label.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        label_samples(changed("labels", policy, label=label), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
