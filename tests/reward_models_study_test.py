"""The study of reward models: its splits, its intervals, its page, and one run of it, shrunken."""

import json
import math
import statistics

import jax
import pytest
import scipy.stats

from benchmarks import reward_models, reward_models_data, reward_models_page
from benchmarks.reward_models import RECIPES, Place, Run, config_of, runs_of, sizes_of
from benchmarks.reward_models_page import Results, Spread, beside, over_seeds
from benchmarks.reward_models_sources import PROVENANCE
from rlhf_jax import sections
from rlhf_jax.card import check_card
from rlhf_jax.data.sources import read_jsonl
from rlhf_jax.label_samples import write_lines
from rlhf_jax.pipeline import check, pipeline


def test_a_draw_is_part_of_a_larger_one_and_keeps_prompts_together():
    records = [{"prompt": f"q{i // 4}", "completion": str(i)} for i in range(40)]
    few, many = (reward_models_data.draw(records, size, seed=3) for size in (8, 20))
    assert many[:8] == few and len({record["prompt"] for record in many}) == 5
    assert reward_models_data.draw(records, 8, seed=4) != few
    named = [{"id": i, "prompt": "one"} for i in range(40)]  # pairs of one debate are drawn apart
    assert reward_models_data.draw(named, 20, seed=3) != named[:20]


def test_no_problem_is_in_two_parts():
    records = [{"question": f"q{i % 50}", "i": i} for i in range(200)]
    found = reward_models_data.split(records, lambda r: r["question"], dev=0.2, test=0.3)
    parts = [{r["question"] for r in part} for part in (found.train, found.dev, found.test)]
    assert [len(part) for part in parts] == list(found.problems)
    assert sum(found.problems) == 50 and min(found.problems) > 0
    assert sum(map(len, (found.train, found.dev, found.test))) == 200


def test_an_interval_over_seeds_and_items_by_hand():
    """Equal seeds leave the items' interval; certain items leave Student's of the seeds."""
    one = Spread(0.6, 0.5, 0.7)
    assert over_seeds([one] * 3) == pytest.approx(one, abs=1e-6)
    values = (0.5, 0.6, 0.7)
    found = over_seeds([Spread(value, value, value) for value in values])
    wide = scipy.stats.t.ppf(0.975, 2) * statistics.stdev(values) / math.sqrt(3)
    assert found == pytest.approx((0.6, 0.6 - wide, 0.6 + wide))
    both = over_seeds([Spread(value, value - 0.1, value + 0.1) for value in values])
    assert both.high - both.value > 0.1 and over_seeds([Spread(1.0, 0.9, 1.0)]).high == 1.0


def test_a_model_stands_above_a_baseline_that_its_interval_excludes():
    model = Spread(0.6, 0.55, 0.65)
    assert [beside(model, x) for x in (0.5, 0.6, 0.7)] == ["above", "not told apart", "below"]


def test_a_problem_is_known_by_its_beginning_in_other_spellings():
    spellings = (
        "Let $x$ be such that\\n\\[ x > 2.\\]",
        "Let $x$ be such that\n\\[\n  x > 2.\n\\]",
        "Let \\(x\\) be such that \\quad x > 2.",
    )
    assert len({reward_models_data.plain(text) for text in spellings}) == 1
    assert reward_models_data.plain("Let y be such that x > 2.") != "letxbesuchthatx"


def test_the_best_writer_is_right_most_often():
    rows = [("a", 1), ("a", 0), ("b", 1), ("b", 1), ("c", 0)]
    records = [{"model": model, "label": bool(label)} for model, label in rows]
    assert reward_models_data.best_writer(records) == "b"


def test_there_are_three_seeds_of_every_set_and_four_sizes_of_two(tmp_path):
    runs = runs_of((0, 1, 2), small=False)
    assert {run.name for run in runs} == set(RECIPES) == set(PROVENANCE)
    assert sum(len(recipe.sizes) >= 4 for recipe in RECIPES.values()) == 2
    assert len({run.folder(Place(tmp_path, tmp_path, False)) for run in runs}) == len(runs)
    assert all(sizes_of(name, small)[-1] == 0 for name in RECIPES for small in (True, False))


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_has_its_seed_known_keys_and_a_card(name, tmp_path):
    place = Place(tmp_path / "data", tmp_path, False)
    config = config_of(place, Run(name, 0, 7))
    sections.check("pipeline", config)
    stages = dict(check(config))
    for stage in stages.values():
        sections.check(stage.program, stage.config)
    assert stages["reward"].config.seed == 7
    check_card(stages["reward"].config)
    assert len(stages["report"].config.reward_sets) == (6 if RECIPES[name].kind == "steps" else 1)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_accuracies_of_samples_and_of_seeds_are_read_from_reports(tmp_path):
    """Scores 1 and −1 of a right and a wrong answer are right, 1 of a wrong one is not."""
    for seed, accuracy in enumerate((0.5, 0.7)):
        folder = tmp_path / str(seed)
        names = ("accuracy", "accuracy_where_longer", "accuracy_where_shorter")
        numbers = {name: dict(value=accuracy, low=accuracy, high=accuracy) for name in names}
        numbers["longer_wins"] = dict(value=0.6, low=None, high=None)
        write(folder / "report/report.json", {"sets": {"test": {"numbers": numbers}}})
        write(folder / "reward/card.json", {"data": [{"records": 12}]})
        write(folder / "summary.json", {"seconds/reward": 5.0})
        lines = [dict(set="test", scores=[1.0, -1.0, 1.0], correct=[True, False, False])]
        lines += [dict(set="test", scores=[2.0], correct=[True]), dict(set="dev", scores=[])]
        (folder / "report/scores.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = Results([tmp_path / "0", tmp_path / "1"])
    assert found.records == 12 and found.fixed("test", "longer_wins") == 0.6
    assert found.spread("test", "accuracy").value == pytest.approx(0.6)
    assert found.accuracy("test").value == pytest.approx(0.75)
    text = reward_models_page.pair_table({"ukp": [found]})
    assert "| UKPConvArg1 | 12 | 0.600 (" in text


@pytest.mark.data
def test_the_parts_of_the_public_sets_are_apart(data_dir):
    """Sizes are those that the page names; PRMBench has no problem of ProcessBench."""
    found = {name: read(data_dir) for name, read in reward_models_data.SETS.items()}
    sizes = {name: tuple(map(len, one[:3])) for name, one in found.items()}
    assert sizes["ukp"] == (7_239, 0, 1_626) and sizes["hh"] == (2_305, 0, 463)
    assert sizes["gsm8k"] == (1_936, 0, 704)
    assert not {r["topic"] for r in found["ukp"].train} & {r["topic"] for r in found["ukp"].test}
    files = reward_models_data.processbench(data_dir)
    seen = {reward_models_data.plain(r["problem"]) for path in files for r in read_jsonl(path)}
    learnt = {reward_models_data.plain(r["prompt"]) for r in found["prmbench"].train}
    names = ("question", "original_question")
    asked = [record[name] for record in found["prmbench"].test for name in names if name in record]
    tested = {reward_models_data.plain(text) for text in asked}
    assert tested and not tested & seen and not tested & learnt
    assert reward_models_data.best_writer(found["gsm8k"].train) == "175b_verification"


@pytest.mark.slow
@pytest.mark.data
def test_one_run_shrunken(data_dir, tmp_path):
    """A process model through training and its reports; the card has what was measured."""
    place = Place(data_dir.resolve(), tmp_path, True)
    found = reward_models_data.bigbench_mistake(place.data)
    place.files.mkdir()
    for part in ("train", "dev", "test"):
        short = sorted(getattr(found, part), key=lambda record: sum(map(len, record["steps"])))
        write_lines(place.files / f"bigbench_mistake_{part}.jsonl", iter(short[:12]))
    texts = reward_models_data.texts_of(found.train[:12])
    reward_models_data.write_tokenizer(place.files / "tokenizer.json", texts)
    run = Run("bigbench_mistake", 0, 0)
    config = config_of(place, run)
    for label in reward_models_data.PROCESSBENCH:
        del config.stages.report.config.reward_sets[label]
    config.stages.reward.config.sources.bigbench_mistake.max_length = 160
    config.stages.reward.config.card.probes.records = 2
    with reward_models.warnings_kept(run.folder(place) / "warnings.txt"):
        pipeline(config, str(run.folder(place)))
    one = Results([run.folder(place)])
    assert one.cards[0]["data"][0]["annotators"] == PROVENANCE["bigbench_mistake"]["annotators"]
    assert one.reports[0]["sets"]["test"]["counts"]["used"] == 12
    assert 0 <= one.spread("test", "step_accuracy").value <= 1
    assert "test/f1" in one.cards[0]["evaluation"]["reports"]["report"]


@pytest.fixture
def own_cache():
    """The study keeps compiled programs in its folder; other tests keep none."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.usefixtures("own_cache")
def test_the_study_runs_shrunken_and_no_run_twice(data_dir, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    arguments = [f"--workdir={tmp_path}", f"--data={data_dir}", f"--page={page}", "--small"]
    monkeypatch.setattr("sys.argv", ["reward_models", *arguments, "--seeds", "0"])
    reward_models.main()
    text = page.read_text()
    assert str(tmp_path) not in text.replace(" ".join(arguments), "")
    assert "python -m rlhf_jax.evaluate" in text and "| rm_bench |" in text
    assert (tmp_path / reward_models_page.FIGURE).is_file()
    written = {path: path.stat().st_mtime for path in tmp_path.glob("*/summary.json")}
    reward_models.main()
    assert page.read_text() == text
    assert {path: path.stat().st_mtime for path in written} == written
