"""Public data through the doors that users have: what `benchmarks.real_input` runs, in seconds."""

import json
import math

import pytest

from benchmarks import grading, real_input, real_input_page
from rlhf_jax.data.preferences import pairs
from rlhf_jax.data.sources import open_source, read_jsonl
from rlhf_jax.ops.reward_metrics import wilson_interval
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.text.tokenizer import ByteTokenizer, load_tokenizer
from rlhf_jax.train_policy import train_policy
from rlhf_jax.train_reward import train_reward

pytestmark = pytest.mark.data
STEPS = 2


@pytest.fixture(scope="module")
def place(data_dir, tmp_path_factory):
    return real_input.Place(data_dir.resolve(), tmp_path_factory.mktemp("real_input"), True)


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_reference_solution_of_gsm8k_is_graded_right(place):
    records = read_jsonl(place.data / "gsm8k/train.jsonl.gz")
    text = load_tokenizer(str(place.gpt2()))
    answers = [record["answer"] for record in records]
    assert len(records) == 7_473
    assert all(grading.grade(records, answers, text))
    for form in ("the number plus one", "no marker"):
        wrong = [grading.WRONG[form](answer) for answer in answers]
        assert not any(grading.grade(records, wrong, text))


def test_changed_solutions_of_gsm8k_are_graded_for_what_they_are(place):
    records = read_jsonl(place.data / "gsm8k/train.jsonl.gz")[:100]
    text = load_tokenizer(str(place.gpt2()))
    rows = list(grading.report(records, text))
    assert {name for name, *_ in rows} == grading.RIGHT.keys() | grading.WRONG.keys()
    assert [(name, count) for name, _, count, so in rows if so != count] == []
    # A solution of another problem is wrong, unless the two answers are the same.
    others = [record["answer"] for record in records[1:] + records[:1]]
    same = [
        other.split("####")[1] == record["answer"].split("####")[1]
        for other, record in zip(others, records, strict=True)
    ]
    assert grading.grade(records, others, text) == same


@pytest.mark.slow  # reading and grading are above, steps in run_test.py and seams_test.py
def test_two_ppo_steps_on_gsm8k(place, tmp_path):
    config = real_input.gsm8k_config(place)
    described = make_plan(config)
    assert described.described["policy"].vocab_size == 50_257
    asked = described.prompts.batch(0, slice(None), 8)
    prompt = described.tokenizer.decode(asked.tokens[0][asked.mask[0]].tolist())
    record = described.prompts.record(0, int(asked.record[0]))
    assert prompt == f"Question: {record['question']}\nAnswer: "
    train_policy(config, str(tmp_path))
    rows = read_metrics(tmp_path)
    assert len(rows) == STEPS
    for row in rows:
        assert math.isfinite(row["update/loss"]) and row["update/skipped"] == 0
        assert row["reward/exact"] == 0.0  # random weights over 50,257 tokens
        assert row["policy/sampler_gap"] < 1e-5


def test_dialogues_are_split_at_the_last_reply(place):
    path = place.data / "hh_rlhf/train.jsonl.gz"
    source = open_source(f"jsonl:{path}", options={"format": "dialogue"})
    for index, whole in enumerate(read_jsonl(path)):
        record = source[index]
        assert record["prompt"].endswith("\n\nAssistant:")
        assert record["prompt"] + record["chosen"] == whole["chosen"]
        assert record["prompt"] + record["rejected"] == whole["rejected"]
    text = ByteTokenizer()
    batch = pairs(
        [source], text, template="{prompt}", max_length=8192, seed=0, shuffle=False
    ).batch(0, slice(None), 1)
    tokens, mask = batch.chosen.tokens[0], batch.chosen.mask[0]
    assert text.decode(tokens[mask].tolist()) == read_jsonl(path)[0]["chosen"]


@pytest.mark.slow  # reward models on dialogues of tests: tests/training, tests/reward_texts_test.py
def test_two_reward_steps_on_dialogues(place, tmp_path):
    config = real_input.config_of("pairs", real_input.hh_argument(place))
    train_reward(config.stages.reward.config, str(tmp_path))
    rows = read_metrics(tmp_path)
    assert len(rows) == STEPS
    assert all(row["loss/pairs"] < 2 and row["update/skipped"] == 0 for row in rows)


def test_the_page_says_what_the_summaries_say():
    """The words follow the numbers."""
    numbers = {"after/gold_gain": 0.25, "after/gold_gain_low": 0.125, "after/gold_gain_high": 0.375}
    assert real_input_page.interval(numbers, "after/gold_gain") == "0.250 (0.125 to 0.375)"
    assert "excludes 0" in real_input_page.verdict(numbers)
    assert "includes 0" in real_input_page.verdict(numbers | {"after/gold_gain_low": -0.1})
    low, high = wilson_interval(80, 100)
    named = {"outcome_model/pair_accuracy_low": low, "outcome_model/pair_accuracy_high": high}
    for longer, said in ((0.5, "beats"), (0.8, "no better and no worse"), (0.95, "not reach")):
        assert said in real_input_page.against_length(named, longer)
    rows = [{"a": x} for x in (0, 0, 0, 0, 0, 9, 1, 1, 1, 1, 1)]
    assert real_input_page.edges(rows, "a") == ["0", "1"]
    lines = [
        {"prompt": p, "stage": s, "completion": f"{s}\n{p}{i}", "gold": 0.5}
        for s in ("before", "after")
        for p in "pq"
        for i in range(2)
    ]
    assert real_input_page.samples(lines).splitlines()[:4] == [
        "**p**",
        "",
        "- before (gold 0.50): before p0",
        "- after (gold 0.50): after p0",
    ]


@pytest.mark.slow
def test_every_part_runs_shrunken_and_is_not_run_again(place, monkeypatch, capsys):
    page = place.workdir / "page.md"
    arguments = [f"--workdir={place.workdir}", f"--data={place.data}", f"--page={page}", "--small"]
    monkeypatch.setattr("sys.argv", ["real_input", *arguments])
    real_input.main()
    text = page.read_text()
    for part in real_input.PARTS:
        assert f"{part} " in text
    assert "python -m benchmarks.real_input" in text and "nan" not in text.lower().split()
    written = {path: path.stat().st_mtime for path in place.workdir.glob("*/summary.json")}
    real_input.main()
    assert page.read_text() == text
    assert {path: path.stat().st_mtime for path in written} == written
