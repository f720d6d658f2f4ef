"""The study of the quickstart: every run can be planned, changes one thing, and has its page."""

import json

import pytest

from benchmarks import quickstart_page
from benchmarks.quickstart_study import KINDS, Run, config_of, runs_of
from rlhf_jax import sections
from rlhf_jax.pipeline import check
from rlhf_jax.rehearse import rehearse
from tests.bad_input_test import few_problems


def leaves(tree, path=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def stages_of(config):
    """What the stages that run hold, by dotted name."""
    return {
        key: value
        for name, stage in check(config)
        for key, value in leaves(stage.config.to_dict(), f"{name}.")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_a_seed_and_known_keys(kind, tmp_path):
    config = config_of(Run(kind, 7), tmp_path, small=False)
    sections.check("pipeline", config)
    for name, stage in check(config):
        sections.check(stage.program, stage.config)
        assert stage.config.seed == 7, name


@pytest.mark.parametrize("kind", ["main", pytest.param("longer", marks=pytest.mark.slow)])
def test_what_starts_from_nothing_can_be_planned(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = few_problems(config_of(Run(kind, 0), tmp_path, small=True))
    rehearse(check(config), str(tmp_path / "run"), [])


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("longer", {"sft.train.steps"}),
        ("shuffled", {"labels.label.shuffle"}),
        ("low_kl", {"policy.algorithm.kl_coef", "policy.train.steps"}),
    ],
)
def test_a_control_changes_what_it_is_about(kind, changed, tmp_path):
    """All else is where things come from, and what is not measured."""
    main, other = (stages_of(config_of(Run(k, 0), tmp_path, small=False)) for k in ("main", kind))
    found = {key for key, value in other.items() if main.get(key) != value}
    places = ("init_from", "reward.sources", "evaluation.reference", ".name")
    assert {key for key in found if not any(place in key for place in places)} == changed


def test_no_control_reads_what_it_does_not_make(tmp_path):
    """A name in braces is a stage of the run itself; others are whole paths of the main run."""
    for kind in KINDS:
        config = config_of(Run(kind, 0), tmp_path, small=False)
        for key, value in stages_of(config).items():
            if isinstance(value, str) and "{workdir}/" in value:
                stage = value.partition("{workdir}/")[2].partition("/")[0]
                assert stage in config.order, (kind, key, value)


def write_summary(folder, **numbers):
    folder.mkdir(parents=True, exist_ok=True)
    facts = dict(seconds=300.0, peak_memory_bytes=2**30, compiles_after_warmup=0)
    facts |= dict(devices="1 x cpu", python="3.12", versions=dict(jax="0.12"))
    (folder / "summary.json").write_text(json.dumps(facts | numbers))


EDGES = {"low": -0.03, "high": 0.04}  # of intervals, so that differences are known to 0.05


def test_the_page_holds_the_gains_of_every_seed(tmp_path):
    names = ("pair_accuracy", "longer_wins", "shorter_wins", "correctness_auc")
    outcome = {f"outcome_model/{name}": 0.75 for name in names}
    names = ("step_auc", "balanced_accuracy", "majority_rate")
    process = {f"process_model/{name}": 0.625 for name in names}
    for run in runs_of([0, 1]):
        if run == Run("shuffled", 1):
            continue
        accuracies = {
            f"{stage}/{name}": share + 0.125 * run.seed
            for stage, share in (("sft", 0.25), ("policy", 0.75))
            for name in ("accuracy", "greedy_accuracy")
        }
        edges = {f"{k}_{edge}": v + d for k, v in accuracies.items() for edge, d in EDGES.items()}
        numbers = {**outcome, **process, **accuracies, **edges, "policy/kl": 1.5}
        write_summary(tmp_path / run.name, **numbers)
    policy = tmp_path / "low_kl_0" / "policy"
    policy.mkdir()
    rows = [
        {"objective/score": step, "reward/exact": 0.5, "objective/kl_ref": 2.0 * step}
        for step in range(10)
    ]
    (policy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = quickstart_page.page(tmp_path, [0, 1], "the command")
    assert "| gain, sampling (points) | +50.0 (+45.0 to +55.0) | +50.0 (+45.0 to +55.0) |" in text
    assert "| policy, greedy | 0.750 (0.720 to 0.790) | 0.875 (0.845 to 0.915) |" in text
    assert "| 20 % more fine-tuning, greedy | +0.0 (-5.0 to +5.0) | +0.0 (-5.0 to +5.0) |" in text
    assert "| shuffled labels, sampling | +50.0 (+45.0 to +55.0) | not run |" in text
    assert "At or above 3 points: shuffled labels, sampling of seed 0, +50.0 (" in text
    assert "| what is paid (`objective/score`) | 2.000 | 7.000 | 7.000 |" in text
