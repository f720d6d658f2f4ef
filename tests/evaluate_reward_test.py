"""Reward models on reward sets: scores as the model says them, numbers recomputed, bad input."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import eval_reward
from rlhf_jax import evaluate_reward as er
from rlhf_jax import sections
from rlhf_jax.evaluate import evaluate
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.model_folder import ModelFolder
from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from rlhf_jax.rehearse import rehearse
from rlhf_jax.score import score, score_name
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.types import Texts
from tests.model_folders import read, run_of, write

MODEL = named_size("tiny", layers=1, lm_head=False, score_heads=("outcome", "process"))
PAIRS = [
    dict(prompt="p", chosen="good one", rejected="bad", category="a", models=["m", "n"]),
    dict(prompt="p", chosen="good", rejected="much worse", category="a", models=["n", "o"]),
    dict(prompt="q", chosen="yes", rejected="no", category="b", models=["m", "o"]),
    dict(prompt="r", chosen="tie", rejected="eit", category="b", tie=True, models=["m", "n"]),
    dict(prompt="s", chosen="same", rejected="same", category="b"),
    dict(prompt="t", chosen="x" * 99, rejected="short", category="b"),
    dict(prompt="u" * 40, chosen="a", rejected="b", category="b"),
    dict(prompt="v", chosen="", rejected="c", category="b"),
]
SAMPLES = [
    dict(prompt="2+2=", completions=["4", "5", "22"], correct=[1, 0, 0]),
    dict(prompt="3+3=", completions=["6", "6 ", "7"], correct=[True, True, False]),
    dict(prompt="4+4=", completions=["8", "8!", "8."], correct=[1, 1, 1]),
]
SOLUTIONS = [
    dict(problem="p", steps=["3+4=7", "7*2=14\nso", "14+1=16"], label=2, generator="g"),
    dict(problem="q", steps=["1+1=2", " ", "2+2=4"], label=-1, generator="g"),
    dict(problem="r", steps=["1+1=3", "3+2=5"], label=0, generator="h"),
    dict(problem="s", steps=["1+1=2", ""], label=1, generator="h"),
]

MESSAGES = [dict(role="user", content="p")]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": -1})


@pytest.fixture(scope="module")
def judge(tmp_path_factory, mesh):
    return run_of(tmp_path_factory.mktemp("judge"), MODEL, mesh)


def config_of(folder, sets, **data):
    config = eval_reward.get_config()
    config.reward.init_from = folder
    config.data.update(dict(max_length=32, rows=8) | data)
    config.resamples = 30
    config.reward_sets = ConfigDict(sets)
    return config


def three_sets(tmp_path):
    files = dict(
        pairs=("pairs", PAIRS), best=("samples", SAMPLES), steps=("processbench", SOLUTIONS)
    )
    return {
        label: dict(form=form, name="jsonl:" + write(tmp_path / f"{label}.jsonl", rows))
        for label, (form, rows) in files.items()
    }


@pytest.fixture(scope="module")
def done(judge, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("done")
    config = config_of(judge[0], three_sets(tmp_path))
    sections.check("evaluate", config)
    numbers = evaluate(config, str(tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    return tmp_path / "run", numbers, report, read(tmp_path / "run" / "scores.jsonl")


def said(params, prompt, completion):
    """What the heads say of one text without padding; the process head where lines end."""
    tokens = np.array([[*(prompt + "\n" + completion).encode(), 256]], np.int32)
    every = np.ones(tokens.shape, bool)
    texts = Texts(tokens=tokens, mask=every, loss_mask=every, segment=every.astype(np.int32))
    model = decoder(MODEL, ShardingRules())
    scores = jax.jit(lambda tree: evaluate_texts(model, tree, {}, texts))(
        jax.device_get(params)
    ).scores
    breaks = [i for i in range(len(prompt) + 1, tokens.shape[1]) if tokens[0, i] == 10]
    ends = np.asarray(scores["process"])[0, [*breaks, -1]]
    return float(scores["outcome"][0, -1]), ends.tolist()


def test_scores_are_those_of_single_texts_without_padding(judge, done):
    lines = {(line["set"], line["record"]): line for line in done[3]}
    first = lines["pairs", 0]
    wanted = [said(judge[1], "p", PAIRS[0][side])[0] for side in ("chosen", "rejected")]
    np.testing.assert_allclose(first["scores"], wanted, atol=1e-6)
    assert first["lengths"] == [9, 4]  # end-of-text included
    wanted = [said(judge[1], "3+3=", text)[0] for text in SAMPLES[1]["completions"]]
    np.testing.assert_allclose(lines["best", 1]["scores"], wanted, atol=1e-6)
    # A step of two lines is judged at its second.
    outcome, ends = said(judge[1], "p", "\n".join(SOLUTIONS[0]["steps"]))
    np.testing.assert_allclose(
        lines["steps", 0]["step_scores"], [ends[i] for i in (0, 2, 3)], atol=1e-6
    )
    np.testing.assert_allclose(lines["steps", 0]["scores"], [outcome], atol=1e-6)


def test_scores_equal_those_of_the_score_program(judge, done, tmp_path):
    texts = [dict(prompt=row["prompt"] + "\n", completion=row["chosen"]) for row in PAIRS[:3]]
    output = tmp_path / "out.jsonl"
    given = write(tmp_path / "in.jsonl", texts)
    score(model=judge[0], input=given, output=str(output), end_of_text=True)
    ours = [line["scores"][0] for line in done[3] if line["set"] == "pairs"][:3]
    np.testing.assert_allclose(ours, [row["score"] for row in read(output)], atol=1e-6)


def test_what_is_left_out_is_counted(done):
    counts = {label: one["counts"] for label, one in done[2]["sets"].items()}
    wanted = dict(
        records=8, equal_sides=1, overlong=1, prompt_fills_window=1, empty=1, ties=1, used=5
    )
    assert {name: counts["pairs"][name] for name in wanted} == wanted
    assert counts["best"]["used"] == 3 and counts["steps"]["used"] == 3
    assert counts["steps"]["blank_wrong_step"] == 1
    page = (done[0] / "report.md").read_text()
    assert "8 records" in page and "1 equal sides" in page and "1 prompt fills window" in page


def test_pair_numbers_are_those_of_the_scores_file(done):
    _, numbers, report, lines = done
    pairs = [line for line in lines if line["set"] == "pairs" and not line["tie"]]
    right = [(a > b) + 0.5 * (a == b) for a, b in (line["scores"] for line in pairs)]
    longer = [(a > b) + 0.5 * (a == b) for a, b in (line["lengths"] for line in pairs)]
    assert numbers["pairs/accuracy"] == np.mean(right)
    assert numbers["pairs/longer_wins"] == np.mean(longer)
    assert numbers["pairs/accuracy_low"] < np.mean(right) <= numbers["pairs/accuracy_high"] + 1e-12
    d = np.array([a - b for a, b in (line["scores"] for line in pairs)])
    assert numbers["pairs/brier"] == pytest.approx(
        np.mean((1 - 1 / (1 + np.exp(-d))) ** 2), abs=1e-9
    )
    category = report["sets"]["pairs"]["categories"]["category"]
    assert category["a"]["value"] == np.mean(right[:2]) and category["a"]["count"] == 2
    assert numbers["pairs/ranking_models"] == 3
    assert 0 <= numbers["pairs/tie_accuracy_best"] <= 1


def test_sample_numbers_are_those_of_the_scores_file(done):
    _, numbers, report, lines = done
    best = [line for line in lines if line["set"] == "best"]
    top = [line["correct"][int(np.argmax(line["scores"]))] for line in best]
    assert numbers["best/best_of_k"] == pytest.approx(np.mean(top))
    assert numbers["best/mean_correct"] == pytest.approx(np.mean([1 / 3, 2 / 3, 1]))
    assert numbers["best/oracle_of_k"] == pytest.approx(1.0)
    curves = report["sets"]["best"]["curves"]
    pairs = [
        np.mean([line["correct"][max(two, key=lambda i: line["scores"][i])] for two in
                 itertools.combinations(range(3), 2)])
        for line in best
    ]  # fmt: skip
    assert curves["model"][1] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert numbers["best/prompts_with_both"] == 2


def test_solution_numbers_are_those_of_the_scores_file(done):
    _, numbers, report, lines = done
    steps = [line for line in lines if line["set"] == "steps"]
    hits = []
    for line in steps:
        wrong = [i for i, s in enumerate(line["step_scores"]) if s <= 0]
        assert line["said_first_wrong"] == (wrong[0] if wrong else -1)
        hits.append(line["said_first_wrong"] == line["first_wrong"])
    # The blank step of the second solution is left out.
    assert [line["first_wrong"] for line in steps] == [2, -1, 0]
    assert [line["labels"] for line in steps] == [[1, 1, 0], [1, 1], [0, None]]
    a, b = (hits[0] + hits[2]) / 2, float(hits[1])
    assert numbers["steps/error_accuracy"] == a and numbers["steps/correct_accuracy"] == b
    assert numbers["steps/f1"] == pytest.approx(2 * a * b / (a + b) if a + b else 0.0)
    claims = [
        (s > 0) == (z == 1)
        for line in steps
        for s, z in zip(line["step_scores"], line["labels"], strict=True)
        if z is not None
    ]
    assert numbers["steps/step_accuracy"] == pytest.approx(np.mean(claims))
    assert report["sets"]["steps"]["numbers"]["blind_f1"]["value"] == pytest.approx(
        1 / (1 + np.sqrt(0.5)) ** 2
    )


def test_the_page_has_every_set_and_its_baselines(done):
    page = (done[0] / "report.md").read_text()
    for heading in ("## Pairs", "## Samples", "## Solutions in steps", "### pairs", "| longer |"):
        assert heading in page
    assert "blind F1" in page and "nan" not in page
    summary = json.loads((done[0] / "summary.json").read_text())
    assert summary["pairs/accuracy"] == done[1]["pairs/accuracy"]
    assert summary["compiles_after_warmup"] == 0


def test_the_batch_does_not_matter(judge, done, tmp_path):
    config = config_of(judge[0], dict(pairs=three_sets(tmp_path)["pairs"]), rows=4)
    numbers = er.evaluate_reward(config, str(tmp_path / "run"))
    wanted = {name: value for name, value in done[1].items() if name in numbers}
    assert numbers == pytest.approx(wanted, abs=1e-5)


def test_a_threshold_from_a_set_and_steps_in_place_of_an_outcome_head(tmp_path, mesh):
    process = dataclasses.replace(MODEL, score_heads=("process",))
    folder, _ = run_of(tmp_path / "process", process, mesh)
    config = config_of(folder, three_sets(tmp_path))
    config.reward.threshold_from = "steps"
    er.evaluate_reward(config, str(tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    lines = read(tmp_path / "run" / "scores.jsonl")
    steps = [line for line in lines if line["set"] == "steps"]
    tried = sorted({0.0, *itertools.chain(*(line["step_scores"] for line in steps))})
    f1s = []
    for threshold in tried:
        found = [
            next((i for i, s in enumerate(line["step_scores"]) if s <= threshold), -1)
            for line in steps
        ]
        hits = [a == line["first_wrong"] for a, line in zip(found, steps, strict=True)]
        a, b = (hits[0] + hits[2]) / 2, float(hits[1])
        f1s.append(2 * a * b / (a + b) if a + b else 0.0)
    assert report["sets"]["steps"]["numbers"]["f1"]["value"] == pytest.approx(max(f1s))
    assert "scores" not in steps[0] and report["heads"]["texts"] == "steps, min"
    # One line is one step, so its weakest step is its only one.
    pair = next(line for line in lines if line["set"] == "pairs")
    single = [dict(form="solutions", prompt="p", steps=[PAIRS[0]["chosen"]], labels=[1])]
    sets = dict(one=dict(form="solutions", name="jsonl:" + write(tmp_path / "one.jsonl", single)))
    er.evaluate_reward(config_of(folder, sets), str(tmp_path / "other"))
    other = read(tmp_path / "other" / "scores.jsonl")[0]
    assert pair["scores"][0] == pytest.approx(other["step_scores"][0], abs=1e-4)


def test_an_outcome_model_still_says_something_of_solutions(tmp_path, mesh):
    outcome = dataclasses.replace(MODEL, score_heads=("outcome",))
    folder, _ = run_of(tmp_path / "outcome", outcome, mesh)
    config = config_of(folder, dict(steps=three_sets(tmp_path)["steps"]))
    numbers = er.evaluate_reward(config, str(tmp_path / "run"))
    assert "steps/outcome_auc" in numbers and "steps/f1" not in numbers


def one_set(tmp_path, form, rows, **section):
    name = "jsonl:" + write(tmp_path / "bad.jsonl", rows)
    return dict(bad=dict(form=form, name=name, **section))


@pytest.mark.parametrize(
    ("form", "rows", "section", "message"),
    [
        ("pairs", [PAIRS[4]], {}, "reward_sets.bad: nothing is left to score .*1 equal_sides"),
        ("pairs", [PAIRS[3]], {}, "all pairs are ties"),
        ("pairs", [PAIRS[5], PAIRS[6]], {}, "1 overlong.*|1 prompt_fills_window"),
        ("samples", [SAMPLES[2]], {}, "all samples are right"),
        ("samples", SAMPLES, dict(pass_rates=(0.9, 0.1)), "wanted two shares from 0 to 1"),
        ("samples", [SAMPLES[2]], dict(pass_rates=(0.1, 0.9)), "1 outside_pass_rates"),
        ("solutions", [dict(prompt="p", steps=["a"], labels=[None])], {}, "no step has a label"),
        (
            "pairs",
            [dict(chosen=1)],
            {},
            r"reward_sets.bad: .*bad.jsonl, line 1: field 'chosen' holds int",
        ),
        (
            "pairs",
            [PAIRS[0], PAIRS[0] | dict(models=[["a"], "b"])],
            {},
            r"bad.jsonl, line 2: field 'models' holds \[\['a'\], 'b'\]; wanted two texts",
        ),
        ("pairs", [PAIRS[0] | dict(models=["", "b"])], {}, "models are .*; wanted two names"),
        ("pairs", PAIRS, dict(limit=-1), "limit=-1; wanted a number of records"),
        ("pears", PAIRS, {}, "reward_sets.bad: form='pears'; known pairs"),
        ("pairs", PAIRS, dict(template="{question}"), "line 1: template .* names field"),
        ("pairs", [PAIRS[0] | dict(prompt=MESSAGES)], {}, "set chat="),
    ],
)
def test_bad_sets_are_named_before_a_device_is_touched(
    judge, tmp_path, form, rows, section, message
):
    config = config_of(judge[0], one_set(tmp_path, form, rows, **section))
    with pytest.raises(ValueError, match=message):
        er.evaluate_reward(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_advantage_model_has_no_score_of_a_text_without_prompt(tmp_path):
    """A prompt that is there, and of which the template writes nothing."""
    config = config_of("judge", one_set(tmp_path, "pairs", PAIRS[:2]))
    folder = ModelFolder("judge", MODEL, load_tokenizer("byte"))
    judge = dataclasses.replace(MODEL, score_heads=("outcome", "expected"))
    advantage = folder._replace(config=judge)
    for template, used in (("{prompt}", folder), ("", folder), ("{prompt}", advantage)):
        config.data.template = template
        assert er.open_sets(config, used)["bad"].counts["used"] == 2
    config.data.template = ""
    with pytest.raises(ValueError, match=r"reward_sets\.bad: nothing is left .*2 no_prompt"):
        er.open_sets(config, advantage)
    assert score_name(judge, er.heads_of(judge).score) == "score (outcome less expected)"
    assert score_name(MODEL, er.heads_of(MODEL).score) == "score"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("reward.init_from", "", "reward.init_from is empty"),
        ("reward.init_from", "nowhere", r"reward\.init_from='nowhere' is not a folder"),
        ("reward.aggregate", "median", "reward.aggregate: how='median'"),
        ("reward.threshold", 1.0, r"reward\.threshold=1\.0"),
        ("reward.threshold_from", "pears", "threshold_from='pears'; wanted a set of solutions"),
        ("data.overlong", "cut", "data.overlong='cut'; known: skip"),
        ("data.tokenizer", "nothing.json", "data.tokenizer"),
    ],
)
def test_bad_configs_are_named(judge, tmp_path, key, value, message):
    config = config_of(judge[0], one_set(tmp_path, "pairs", PAIRS))
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        er.evaluate_reward(config, str(tmp_path / "run"))


def test_heads_are_found_or_named():
    assert er.heads_of(MODEL) == ("score", "step_scores")
    assert er.heads_of(MODEL, "process") == ("", "step_scores")
    one = dataclasses.replace(MODEL, score_heads=("judge",))
    assert er.heads_of(one) == ("score", "step_scores")
    several = dataclasses.replace(MODEL, score_heads=("tone", "reach"))
    assert er.heads_of(several, "reach") == ("reach_score", "reach_step_scores")
    with pytest.raises(ValueError, match=r"reward\.head='tne'; the model's heads are tone, reach"):
        er.heads_of(several, "tne")
    with pytest.raises(ValueError, match="has no outcome or process head; its heads are value"):
        er.heads_of(dataclasses.replace(MODEL, score_heads=("value",)))


@pytest.mark.parametrize("samples", [4, 10, 32])
def test_prompts_that_come_out_right_too_seldom_or_too_often_are_left_out(judge, tmp_path, samples):
    # A-PPE-3, on random matrices: shares outside [0.1, 0.9] go, both ends stay.
    rng = np.random.default_rng(samples)
    right = rng.random((40, samples)) < rng.random((40, 1))
    right[:4] = np.arange(samples) < np.array([[0], [samples], [samples // 10], [samples - 1]])
    rows = [
        dict(prompt=f"p{i}", scores=row.tolist())
        | {f"response_{j + 1}": f"answer {j}" for j in range(samples)}
        for i, row in enumerate(right)
    ]
    wanted = [
        i for i, n in enumerate(right.sum(axis=1).tolist()) if samples <= 10 * n <= 9 * samples
    ]
    config = config_of(judge[0], one_set(tmp_path, "ppe_correctness", rows, pass_rates=(0.1, 0.9)))
    found = er.open_sets(config, er.open_model(config))["bad"]
    assert [entry.record for entry in found.entries] == wanted
    assert found.counts["outside_pass_rates"] == 40 - len(wanted) > 4
    assert [list(entry.item.correct) for entry in found.entries] == right[wanted].tolist()


def test_long_texts_are_cut_if_asked(judge, tmp_path):
    config = config_of(
        judge[0], one_set(tmp_path, "pairs", [PAIRS[0], PAIRS[5]]), overlong="truncate"
    )
    opened = er.open_model(config)
    found = er.open_sets(config, opened)["bad"]
    assert found.counts["overlong"] == 1 and found.counts["used"] == 2
    assert len(found.entries[1].rows[0].tokens) == 32
    config.data.overlong = "error"
    with pytest.raises(ValueError, match=r"line 2: 102 tokens but data\.max_length=32"):
        er.open_sets(config, opened)


def test_empty_completions_need_an_end_of_text(judge, tmp_path):
    config = config_of(judge[0], one_set(tmp_path, "pairs", PAIRS), end_of_text=False)
    counts = er.open_sets(config, er.open_model(config))["bad"].counts
    assert counts["empty"] == 1 and counts["used"] == 4


def test_a_limit_spreads_over_the_file(judge, tmp_path):
    config = config_of(judge[0], one_set(tmp_path, "pairs", PAIRS[:4] * 5, limit=4))
    found = er.open_sets(config, er.open_model(config))["bad"]
    assert [entry.record for entry in found.entries] == [0, 6, 12, 19]


def test_scores_that_are_no_numbers_stop_the_program(judge, tmp_path):
    config = config_of(judge[0], one_set(tmp_path, "pairs", PAIRS[:1]))
    found = er.open_sets(config, er.open_model(config))["bad"]
    lines = [dict(score=float("nan"), step_scores=[0.0], tokens=[1])] * 2
    with pytest.raises(ValueError, match="record 0: a score of the model is not finite"):
        er.read_scores(found, lines, er.Heads("score", "step_scores"), "min")


def test_a_pipeline_rehearses_it(judge, tmp_path):
    config = config_of(judge[0], one_set(tmp_path, "pairs", PAIRS))
    for program in ("evaluate", "evaluate_reward"):
        stage = ConfigDict(dict(program=program, config=config.to_dict()))
        rehearse([("report", stage)], str(tmp_path / "run"), done=[])
    bad = ConfigDict(dict(program="evaluate", config=config.to_dict()))
    bad.config.reward_sets.bad.form = "pears"
    with pytest.raises(ValueError, match=r"stages\.report\.config: reward_sets\.bad: form='pears'"):
        rehearse([("report", bad)], str(tmp_path / "run"), done=[])


@pytest.mark.data
def test_real_files_from_end_to_end(judge, tmp_path, data_dir):
    # A sample of the rows; the whole files are docs/results/reward_models.md's affair.
    files = f"rm_bench={data_dir}/rm_bench/pairs.jsonl.gz,"
    files += f"processbench={data_dir}/processbench/gsm8k.jsonl.gz"
    config = eval_reward.get_config(f"model={judge[0]},{files},limit=12,max_length=1024")
    config.resamples = 50
    numbers = evaluate(config, str(tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for label in ("rm_bench", "processbench"):
        counts = report["sets"][label]["counts"]
        assert counts["records"] == 12 and counts["used"] >= 3
    levels = report["sets"]["rm_bench"]["categories"]["level"]
    assert set(levels) == {"easy", "normal", "hard"}
    assert numbers["rm_bench/accuracy"] == pytest.approx(
        np.average(
            [one["value"] for one in levels.values()], weights=[c["count"] for c in levels.values()]
        )
    )
    assert {"rm_bench/longer_wins", "rm_bench/accuracy_low", "processbench/f1"} <= numbers.keys()
    assert 0 <= numbers["processbench/f1_low"] <= numbers["processbench/f1"]
