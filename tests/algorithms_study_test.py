"""The study of algorithms: every run can be planned, and its page says what the runs left."""

import json

import pytest

from benchmarks import algorithms_page
from benchmarks.algorithms import (
    METHODS,
    base_config,
    evaluation_config,
    method_config,
    offline_config,
)
from rlhf_jax import build, sections
from rlhf_jax.find import members

SEEDS = (0, 1)


def test_the_study_has_every_method_of_the_shelf():
    shown = {settings.get("name", method) for method, settings in METHODS.items()}
    assert shown == set(members("algorithms"))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_has_known_keys_and_its_seed(method, tmp_path):
    config = method_config(method, 7, tmp_path / "base_7", small=False)
    sections.check("train_policy", config)
    algorithm = build.algorithm(config)
    assert config.seed == 7 and config.rollout.samples >= algorithm.needs.min_group
    assert config.rewards.exact.weight == 0  # gold trains nothing
    assert config.model.init_from == str(tmp_path / "base_7" / "sft")


def test_base_and_evaluation_have_known_keys(tmp_path):
    sections.check("pipeline", base_config(3, small=False))
    offline = offline_config(3, tmp_path / "base_3", small=False)
    sections.check("train_dpo", offline)
    assert offline.seed == 3 and str(tmp_path / "base_3" / "labels") in offline.sources.pairs.name
    config = evaluation_config(["ppo", "grpo"], 3, tmp_path / "base_3", small=False)
    sections.check("evaluate", config)
    assert config.policies.grpo.init_from == str(tmp_path / "grpo_3")


def write(path, **numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers))


@pytest.fixture(name="done")
def finished_runs(tmp_path):
    """Two methods and two seeds; "worse" gains nothing on seed 1."""
    facts = dict(devices="1 x cpu", python="3.12", versions=dict(jax="0.12"))
    rollout = dict(prompts=4, samples=2)
    for seed in SEEDS:
        numbers = {}
        for name, gain in (("better", 0.3), ("worse", 0.2 - 0.3 * seed)):
            for mode in algorithms_page.MODES:
                change = f"{name}/{mode}_change"
                numbers |= {
                    change: gain,
                    f"{change}_low": gain - 0.05,
                    f"{change}_high": gain + 0.05,
                }
                numbers |= {f"sft/{mode}": 0.4}
            numbers[f"{name}/kl"] = 1.5 + seed
            folder = tmp_path / f"{name}_{seed}"
            write(folder / "summary.json", seconds=60.0 + seed, peak_memory_bytes=2**30)
            policy = dict(learning_rate=3e-4)
            settings = dict(algorithm=dict(name=name, clip=0.2), optimizer=dict(policy=policy))
            write(folder / "config.json", rollout=rollout, train=dict(steps=2), **settings)
            row = {"objective/score": 1.0, "rollout/length": 20.0 + seed, "reward/exact": 0.5}
            lines = [json.dumps(row), json.dumps(row | {"objective/score": 2.0 + seed})]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        write(tmp_path / f"evaluation_{seed}" / "summary.json", **facts, **numbers)
    return tmp_path


def test_the_page_says_what_the_runs_left(done, tmp_path):
    page = tmp_path / "out" / "algorithms.md"
    page.parent.mkdir()
    algorithms_page.write(page, done, SEEDS, ["better", "worse"], "the command")
    text = page.read_text()
    assert (page.parent / algorithms_page.FIGURE).stat().st_size > 0
    assert "| better | +30.0 (+25.0 to +35.0) | +30.0 (+25.0 to +35.0) | +30.0 |" in text
    assert "| worse | +20.0 (+15.0 to +25.0) | -10.0 (-15.0 to -5.0) | +5.0 |" in text
    # KL, learned reward and length as means over seeds; the slowest run's seconds.
    assert "| better | 2.00 | 2.50 | 20.50 | 61 | 1.00 |" in text
    missed = "worse, sampling, seed 1 (-10.0 (-15.0 to -5.0)); worse, greedy, seed 1"
    assert missed in text.replace("\n", " ") and "better, sampling" not in text
    assert "16 completions in all" in text


def test_a_method_that_beats_the_start_everywhere_is_not_named(done):
    evaluations = [json.loads((done / f"evaluation_{s}/summary.json").read_text()) for s in SEEDS]
    assert algorithms_page.verdict(evaluations, ["better"], SEEDS).endswith("none.")
