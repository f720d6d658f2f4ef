"""Choosing among a policy's samples: ways agree with each other and with the score program."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.best_of_n import get_config
from rlhf_jax import sections
from rlhf_jax.evaluate import evaluate
from rlhf_jax.evaluate_best_of import Drawn, curves
from rlhf_jax.mesh import make_mesh
from rlhf_jax.models.config import named_size
from rlhf_jax.rewards.exact_match import parse_answer
from rlhf_jax.score import score
from tests.model_folders import read, run_of, write

ALPHABET = "ab \n#12"
TOKENIZER = "chars:" + ALPHABET
PROMPTS = ("a", "ab", "ba", "b")
POLICY = named_size("tiny", layers=1, vocab_size=len(ALPHABET) + 2)
REWARD = dataclasses.replace(POLICY, lm_head=False, score_heads=("outcome", "process"))
GOLD = dict(name="keywords", words=("a", "b"), limit=2)
SIZES = (1, 2, 4, 8)
MARKER = "#"


def folders(folder):
    mesh = make_mesh({"data": -1})
    for name, model in (("policy", POLICY), ("reward", REWARD)):
        (folder / name).mkdir(parents=True)
        run_of(folder / name, model, mesh, TOKENIZER)
    return folder


def config_of(folder, **changes):
    described = get_config().to_dict()
    described["data"] |= dict(
        name="inline", options=dict(prompt=PROMPTS), template="{prompt}", max_prompt=2,
        tokenizer=TOKENIZER, split="train",
    )  # fmt: skip
    config = ConfigDict(described)
    config.rollout.update(prompts=4, samples=8, max_tokens=8)
    config.policies = dict(one=dict(init_from=str(folder / "policy")))
    config.problems, config.gold = 4, GOLD
    config.best_of = dict(sizes=SIZES, marker=MARKER, draws=20)
    config.best_of.weights = dict(outcome="sigmoid")
    for section in config.rewards.values():
        if "init_from" in section:
            section.init_from = str(folder / "reward")
    with config.unlocked():
        config.rewards.truth = GOLD
    for path, value in changes.items():
        section, _, key = path.rpartition(".")
        target = config[section] if section else config
        target[key] = value
    sections.check("evaluate", config)
    return config


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The numbers of an evaluation, and its folder."""
    folder = folders(tmp_path_factory.mktemp("best"))
    numbers = evaluate(config_of(folder), str(folder / "out"))
    return numbers, folder


def test_choosing_by_the_truth_is_the_oracle_and_one_sample_is_no_choice(found):
    numbers, folder = found
    for k in SIZES:
        assert numbers[f"one/best_of_{k}/truth"] == pytest.approx(numbers[f"one/oracle_{k}"])
        for label in ("outcome", "process", "length"):
            assert numbers[f"one/best_of_{k}/{label}"] <= numbers[f"one/oracle_{k}"] + 1e-12
    rows = read(folder / "out/evaluation.jsonl")
    assert len(rows) == 4 * 8
    mean = np.mean([row["gold"] for row in rows])
    for name in ("gold", "oracle_1", "best_of_1/outcome", "best_of_1/process", "best_of_1/length"):
        assert numbers[f"one/{name}"] == pytest.approx(mean)
    rising = [numbers[f"one/oracle_{k}"] for k in SIZES]
    assert rising == sorted(rising) and rising[-1] > rising[0]
    # Of all eight the estimate is the choice itself.
    best = [max(rows[i : i + 8], key=lambda row: row["scores"]["outcome"]) for i in range(0, 32, 8)]
    wanted = np.mean([row["gold"] for row in best])
    assert numbers["one/best_of_8/outcome"] == pytest.approx(wanted)
    assert (folder / "out/best_of_n.png").stat().st_size > 10_000
    summary = json.loads((folder / "out/summary.json").read_text())
    assert summary["one/best_of_8/outcome"] == numbers["one/best_of_8/outcome"]


def test_votes_count_numbers_behind_the_marker(found):
    """Of all eight samples the vote is one count, made again here from evaluation.jsonl."""
    numbers, folder = found
    rows = read(folder / "out/evaluation.jsonl")
    plain, weighted = [], []
    for first in range(0, len(rows), 8):
        group = rows[first : first + 8]
        answers = [parse_answer(row["completion"], MARKER) for row in group]
        votes: dict[str, list[float]] = {}
        for answer, row in zip(answers, group, strict=True):
            if answer is not None:
                weight = 1 / (1 + np.exp(-row["scores"]["outcome"]))
                votes.setdefault(answer, []).append(weight)
        for found_by, into in ((len, plain), (sum, weighted)):
            most = max(map(found_by, votes.values()), default=0.0)
            ahead = [answer for answer in votes if found_by(votes[answer]) >= most - 1e-12]
            worth = [
                np.mean([row["gold"] for a, row in zip(answers, group, strict=True) if a == answer])
                for answer in ahead
            ]
            into.append(np.mean(worth) if worth else 0.0)
    assert numbers["one/majority_8"] == pytest.approx(np.mean(plain))
    assert numbers["one/weighted_8/outcome"] == pytest.approx(np.mean(weighted))


def test_a_weight_may_turn_a_vote():
    found = Drawn(
        rows=[],
        gold=np.array([[1.0, 0.0, 0.0]]),
        scores={"judge": np.array([[2.0, -1.0, -1.0]])},
        answers=[["5", "6", "6"]],
    )
    best_of = dict(sizes=(3,), weights=dict(judge="sigmoid"))
    made = curves(found, ConfigDict(dict(best_of=best_of, seed=0)))
    assert made["majority"].tolist() == [[0.0]] and made["weighted/judge"].tolist() == [[1.0]]
    assert made["best_of/judge"].tolist() == made["oracle"].tolist() == [[1.0]]
    with pytest.raises(ValueError, match=r"best_of.weights.judge='score': a vote cannot weigh -1"):
        curves(found, ConfigDict(dict(best_of=best_of | dict(weights=dict(judge="score")), seed=0)))


def test_scores_are_those_of_the_score_program(found, tmp_path):
    _, folder = found
    rows = [row for row in read(folder / "out/evaluation.jsonl") if not row["truncated"]]
    assert len(rows) > 1
    texts = [{k: row[k] for k in ("prompt", "completion")} for row in rows]
    output = tmp_path / "scores.jsonl"
    score(
        model=str(folder / "reward"), input=write(tmp_path / "texts.jsonl", texts),
        output=str(output), end_of_text=True,
    )  # fmt: skip
    for row, said in zip(rows, read(output), strict=True):
        assert row["scores"]["outcome"] == pytest.approx(said["score"], abs=1e-5)
        weakest = 1 / (1 + np.exp(-min(said["step_scores"])))
        assert row["scores"]["process"] == pytest.approx(weakest, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_of.sizes": (1, 9)}, r"best_of.sizes=\(1, 9\); wanted rising .* rollout.samples=8"),
        ({"best_of.sizes": (2, 1)}, r"best_of.sizes=\(2, 1\); wanted rising"),
        ({"best_of.weights": dict(outcome="softmax")}, "weights.outcome='softmax'; known: sigmoid"),
        ({"best_of.weights": dict(outcom="score")}, "weights.outcom: no such reward; rewards has"),
        ({"problems": 1}, "problems=1; wanted 2 or more"),
        ({"gold": dict(name="outcome_model")}, "gold.name='outcome_model' is a learned reward"),
        ({"rewards.outcome": dict(name="outcome_model", init_from="")}, "init_from is empty"),
        ({"rewards.outcome": dict(name="outcome_modle")}, "outcome_model"),
    ],
)
def test_what_cannot_be_evaluated_is_named(changes, message, found, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(config_of(found[1], **changes), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
