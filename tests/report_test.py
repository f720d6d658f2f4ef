"""The picture of a pipeline: which columns it shows, and that it is drawn from what runs leave."""

import json
import time

from ml_collections import ConfigDict

from rlhf_jax import run_folder
from rlhf_jax.report import report, reward_columns
from rlhf_jax.training.writer import write_json

REWARDS = {"outcome": {"weight": 1.0}, "exact": {"weight": 0.0}}


def stages(**programs):
    config = dict(rewards=REWARDS, policies=dict(a=dict(), b=dict()), reference="b")
    return {
        name: ConfigDict(dict(program=program, config=config)) for name, program in programs.items()
    }


def leave(folder, ending):
    """What the two stages leave in their folders."""
    rows = [
        {"step": step, "objective/score": step, "reward/outcome": 2.0 * step, "reward/exact": None}
        for step in range(3)
    ]
    (folder / "policy").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "policy/metrics.jsonl").write_text(text)
    numbers = {"compiles_after_warmup": 0}
    for stage in ("a", "b"):
        name = f"{stage}/{ending}"
        numbers |= {name: 0.5, f"{name}_low": 0.25, f"{name}_high": 0.75}
    (folder / "judged").mkdir()
    write_json(folder / "judged/summary.json", numbers | run_folder.closing_facts(time.time()))


def test_a_reward_of_weight_0_is_gold():
    trained, gold = reward_columns(REWARDS)
    assert trained == {"sum, weighted": "objective/score", "outcome": "reward/outcome"}
    assert gold == {"exact": "reward/exact"}


def test_either_evaluation_is_drawn(tmp_path):
    for program, ending in (("evaluate", "accuracy"), ("evaluate_gold", "gold")):
        leave(tmp_path / program, ending)
        path = report(tmp_path / program, stages(policy="train_policy", judged=program))
        assert path == tmp_path / program / "report.png"
        assert path.read_bytes()[1:4] == b"PNG" and path.stat().st_size > 20_000


def test_without_a_policy_or_an_evaluation_there_is_no_picture(tmp_path):
    assert report(tmp_path, stages(policy="train_policy", sft="train_sft")) is None
    assert report(tmp_path, stages(judged="evaluate")) is None
    assert not list(tmp_path.iterdir())
