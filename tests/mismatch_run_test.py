"""A policy run that is watched: its alarms, the frozen learning rate, resume, and its report."""

import itertools
import json
import logging

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.ppo_tiny import get_config
from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.mismatch_page import page
from rlhf_jax.mismatch_plan import REFUSALS, make_watch
from rlhf_jax.ops.length_bias import length_gain, within_prompt_correlations
from rlhf_jax.ops.mismatch import ALARMS, Course
from rlhf_jax.train_policy import train_policy
from rlhf_jax.types import Needs
from tests import compiling
from tests.run_test import assert_same_run, lines

STEPS, EVERY = 8, 2
ROWS = 32  # completions of a step
REFERENCE = Needs(reference=True)


def watched(**monitor):
    """ppo_tiny on a task of one token, with a twin that likes another token."""
    config = get_config()
    config.model = dict(name="tiny", init_from="", layers=1, remat="none")
    config.algorithm = dict(name="grpo")
    config.rewards = dict(
        likes=dict(name="tests.toys.likes", weight=1.0, token=5),
        twin=dict(name="tests.toys.likes", weight=0.0, token=6),
        gold=dict(name="length", weight=0.0, per_token=-1.0, free=0),
        exact=dict(name="exact_match", weight=0.0),  # on the host
    )
    config.rollout.max_tokens = 8
    config.train.steps = STEPS
    config.log.samples_every, config.log.samples = 1, ROWS
    config.checkpoint.every = 3
    config.optimizer.policy.learning_rate = 5e-3
    with config.unlocked():
        del config["value"], config.optimizer["value"]
        # Moved when the run stops, so that it is resumed with what they hold.
        config.controllers = dict(
            kl_coef=dict(target=0.5, horizon=ROWS), reference=dict(every=4, decay=0.9)
        )
        if monitor:
            config.monitor = monitor
    return config


def watch_all(**changes):
    alarms = dict(kl_max=2.0, in_a_row=2, window=3)
    roles = dict(proxy="likes", held_out="twin", gold="gold")
    return roles | dict(every=EVERY, start=2, freeze=True, refusals=("1",), alarms=alarms) | changes


@pytest.fixture(scope="module", name="folders")
def runs(tmp_path_factory):
    """Two runs: one whole, one stopped in the middle of an evaluation."""
    root = tmp_path_factory.mktemp("runs")
    warned = {}

    class Kept(logging.Handler):
        def emit(self, record):
            warned.setdefault(place, []).append(record.getMessage())

    handler = Kept(logging.WARNING)
    logging.getLogger("rlhf_jax.mismatch_watch").addHandler(handler)
    counted = {}
    for place, config, steps in (
        ("whole", watched(**watch_all()), STEPS),
        ("parts", watched(**watch_all()), 5),
        ("parts", watched(**watch_all()), STEPS),
    ):
        config.train.steps = steps
        with pytest.MonkeyPatch.context() as patch:
            started = compiling.remember_runs(patch)
            train_policy(config, str(root / place))
            counted[place] = compiling.times_compiled(started[0])
    logging.getLogger("rlhf_jax.mismatch_watch").removeHandler(handler)
    return root, warned, counted


def evaluations(folder):
    return [row for row in lines(folder, "metrics.jsonl") if "monitor/divergence" in row]


def test_an_alarm_freezes_the_policy_and_the_run_goes_on(folders):
    root, warned, counted = folders
    rows = evaluations(root / "whole")
    assert [row["step"] for row in rows] == [1, 3, 5, 7]
    alarm = [row["monitor/alarm/kl"] for row in rows]
    scale = [row["monitor/lr_scale"] for row in rows]
    first = alarm.index(1.0)
    assert 0 < first < 3, alarm  # else the test shows nothing
    fired = [any(row[f"monitor/alarm/{name}"] for name in ALARMS) for row in rows]
    at = fired.index(True)
    assert scale == [1.0] * at + [0.0] * (4 - at)
    # The step that raised it is the last one that moved the policy: afterwards the second of the
    # two minibatches meets the policy that the first one met.
    moved = {row["step"]: row["policy/kl_old"] for row in lines(root / "whole", "metrics.jsonl")}
    frozen = rows[at]["step"]
    assert all(kl > 0 for step, kl in moved.items() if step <= frozen), moved
    assert all(kl == 0 for step, kl in moved.items() if step > frozen), moved
    said = [line for line in warned["whole"] if "alarm kl" in line]
    assert len(said) == 1
    assert f"step {rows[first]['step']}: alarm kl" in said[0] and "kl_max=2.0" in said[0]
    assert "samples" in said[0] and "learning rate is 0" in said[0]
    assert counted["whole"].keys() >= {"generate", "evaluate", "update", "move_reference"}
    assert set(counted["whole"].values()) == {1}, counted["whole"]


@pytest.mark.slow
def test_to_be_watched_changes_nothing(folders, tmp_path):
    root, _, _ = folders
    train_policy(watched(), str(tmp_path / "plain"))
    assert not (tmp_path / "plain/report.md").exists()
    every, free = (lines(at, "metrics.jsonl") for at in (root / "whole", tmp_path / "plain"))
    frozen = next(row["step"] for row in every if row.get("monitor/lr_scale") == 0)
    assert frozen > 1
    for ours, theirs in zip(every, free, strict=True):
        own = {name: x for name, x in ours.items() if not name.startswith("monitor/")}
        assert (own == theirs) == (ours["step"] <= frozen)


def test_stopped_within_an_evaluation_and_resumed_is_never_stopped(folders):
    root, warned, _ = folders
    assert_same_run(root / "whole", root / "parts")
    assert warned["parts"] == warned["whole"]  # said once, not again after the resume
    assert (root / "parts/report.md").read_text() == (root / "whole/report.md").read_text()


def test_controllers_go_on_as_they_were(folders):
    """β by its rule from one step to the next, in both runs, and one move before the stop."""
    root, _, _ = folders
    for place in ("whole", "parts"):
        rows = lines(root / place, "metrics.jsonl")
        assert [row["controller/reference_moved"] for row in rows] == [0, 0, 0, 1, 0, 0, 0, 1]
        for row, after in itertools.pairwise(rows):
            error = min(max(row["objective/kl_ref"] / 0.5 - 1, -0.2), 0.2)
            wanted = row["controller/kl_coef"] * (1 + error)
            assert after["controller/kl_coef"] == pytest.approx(wanted, rel=1e-6)
        assert rows[0]["controller/kl_coef"] == pytest.approx(0.001)
        assert rows[1]["controller/kl_coef"] < 0.001 < rows[-1]["controller/kl_coef"]


def test_numbers_are_those_of_the_completions(folders):
    """Means over the steps of an evaluation, and its last batch, again from samples.jsonl."""
    root, _, _ = folders
    samples = lines(root / "whole", "samples.jsonl")
    steps = {row["step"]: row for row in lines(root / "whole", "metrics.jsonl")}
    for row in evaluations(root / "whole"):
        both = [steps[row["step"] - 1], row]
        for name, metric in (("proxy", "reward/likes"), ("kl", "objective/kl_ref")):
            mean = (both[0][metric] + both[1][metric]) / 2
            assert row[f"monitor/{name}"] == pytest.approx(mean, rel=1e-6)
        last = [s for s in samples if s["step"] == row["step"]]
        assert len(last) == ROWS
        refused = np.mean(["1" in s["completion"] for s in last])
        assert row["monitor/refusals"] == pytest.approx(refused)
        likes, gold = (
            np.array([s[f"reward/{name}"] for s in last]).reshape(8, 4)
            for name in ("likes", "gold")
        )
        told = [
            (1 + np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])) / 2
            for a, b in zip(likes, gold, strict=True)
            for i in range(4)
            for j in range(i)
            if b[i] != b[j]
        ]
        if told:
            assert row["monitor/accuracy"] == pytest.approx(np.mean(told))


def test_the_report_says_what_happened(folders):
    root, _, _ = folders
    text = (root / "whole/report.md").read_text()
    rows = evaluations(root / "whole")
    first = next(row["step"] for row in rows if row["monitor/alarm/kl"])
    assert f"| kl | KL > 2.0 nats per completion | step {first}, last at" in text
    assert "policy reward -> gold | 4 |" in text
    assert "`likes` on held-out data, accuracy: unknown" in text
    assert text.count("\n| 7 |") == 1


def small(**monitor):
    return ConfigDict(
        dict(
            rewards=dict(a=dict(weight=1.0), b=dict(weight=0.0), c=dict(weight=0.0)),
            algorithm=dict(name="grpo"),
            train=dict(steps=100),
            monitor=dict(proxy="a", every=2) | monitor,
        )
    )


def test_what_is_not_said_is_as_documented():
    watch = make_watch(small(), REFERENCE)
    assert (watch.held_out, watch.gold, watch.start, watch.freeze) == ("", "", 4, False)
    assert watch.refusals == REFUSALS and watch.thresholds.divergence == 0.35
    assert (watch.thresholds.in_a_row, watch.thresholds.window) == (5, 20)
    assert watch.thresholds.kl_max is None
    assert make_watch(ConfigDict(dict(rewards={})), REFERENCE) is None
    # As typed on a phone, and as people write it.
    assert make_watch(small(refusals=("I CAN\u2019T",)), REFERENCE).refusals == ("i can't",)


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        (dict(every=101), r"monitor.every=101 is more than the policy's 100 steps"),
        (dict(proxy="x"), r"monitor.proxy='x'; wanted one of rewards: a, b, c"),
        (dict(proxy=""), r"monitor.proxy=''; wanted one of rewards"),
        (dict(held_out="x"), r"monitor.held_out='x'; wanted"),
        (dict(gold="x"), r"monitor.gold='x'; wanted"),
        (dict(held_out="a"), "monitor.proxy and monitor.held_out are both 'a'"),
        (dict(held_out="b", gold="b"), "monitor.held_out and monitor.gold are both 'b'"),
        (dict(proxy="b"), "monitor.proxy='b' has weight 0 and trains nothing"),
        (dict(proxy="d", held_out="a"), "monitor.proxy='d'"),
        (dict(alarms=dict(divergence=0.0)), "monitor.alarms.divergence=0.0; wanted a number above"),
        (dict(alarms=dict(kl_max=-1.0)), "monitor.alarms.kl_max=-1.0; wanted a number above 0"),
        (dict(alarms=dict(kl_target=0.0)), "monitor.alarms.kl_target=0.0; wanted a number above 0"),
        (dict(alarms=dict(length=1.0)), "monitor.alarms.length=1.0; wanted a number above 1"),
        (dict(alarms=dict(refusals=0.5)), "monitor.alarms.refusals=0.5; wanted a number above 1"),
        (dict(alarms=dict(window=2)), "monitor.alarms.window=2; wanted 3 or more evaluations"),
        (dict(refusals=("no", "")), "monitor.refusals holds an empty text"),
    ],
)
def test_a_watch_that_cannot_work_is_refused(monitor, message):
    with pytest.raises(ValueError, match=message):
        make_watch(small(**monitor), REFERENCE)


def test_what_the_policy_trains_on_is_no_yardstick():
    for key in ("held_out", "gold"):
        config = small(**{key: "b"})
        config.rewards.b.weight = 0.5
        with pytest.raises(ValueError, match=f"monitor.{key}='b' has weight 0.5, so the policy"):
            make_watch(config, REFERENCE)


def test_a_twin_that_is_the_same_model_is_refused():
    config = small(held_out="b")
    for label in "ab":
        config.rewards[label].update(ConfigDict(dict(name="outcome_model", init_from="runs/rm")))
    with pytest.raises(ValueError, match=r"'b' is the same model as 'a' \(init_from='runs/rm'\)"):
        make_watch(config, REFERENCE)
    config.rewards.b.head = "other"
    assert make_watch(config, REFERENCE).held_out == "b"


def test_kl_thresholds_need_a_reference():
    needs = grpo(kl_coef=0.0).needs
    assert not needs.reference
    with pytest.raises(ValueError, match=r"kl_max=5\.0, but grpo as configured computes no KL"):
        make_watch(small(alarms=dict(kl_max=5.0)), needs)


def row(step, **numbers):
    """A line of metrics.jsonl with an evaluation in which nothing else was measured."""
    names = (
        *("proxy", "z_proxy", "z_held_out", "z_gold", "divergence", "corr_reward_gold", "accuracy"),
        *("kl", "length", "corr_length_reward", "nrg_ratio", "refusals"),
    )
    blank = {f"monitor/{name}": None for name in names} | {"monitor/lr_scale": 1.0, "step": step}
    blank |= {f"monitor/alarm/{name}": 0.0 for name in ALARMS}
    return blank | {f"monitor/{name}": x for name, x in numbers.items()}


def test_a_page_says_what_it_cannot_know(tmp_path):
    (tmp_path / "summary.json").write_text(
        json.dumps({"eval/pairs/accuracy": 0.8125, "eval/pairs/loss": 0.5, "seconds": 3})
    )
    config = small()
    config.rewards.a.init_from = str(tmp_path)
    watch = make_watch(config, REFERENCE)
    start = {name: np.full(4, np.nan, np.float32) for name in Course._fields}
    start |= {name: np.arange(4, dtype=np.float32) for name in ("proxy", "length", "refusals")}
    text = page(watch, config.rewards, [], start)
    assert "`a` on held-out data, accuracy: pairs 0.812" in text
    assert "No evaluation yet: the first one is after 2 steps." in text
    assert text.count("cannot be computed: no gold") == 3
    assert "| divergence | off: no held-out reward model | never |" in text
    rows = [row(2 * i + 1, z_proxy=float(i)) for i in range(100)]
    text = page(watch, config.rewards, rows, start)
    assert "One of 3 evaluations" in text  # 34 lines of 100
    assert "\n| 199 | 99 | – |" in text and "\n| 197 |" not in text


def test_refusals_have_no_alarm_before_they_double(folders):
    """The start's share of refusals is high here, as every "1" is one: no alarm."""
    root, _, _ = folders
    assert not any(r["monitor/alarm/refusals"] for r in evaluations(root / "whole"))
    assert all(0 < r["monitor/refusals"] < 1 for r in evaluations(root / "whole")[:1])


def test_lengths_are_compared_in_buckets(folders):
    """Completions of at most 8 tokens are one bucket: all of the gain is within it."""
    root, _, _ = folders
    for one in evaluations(root / "whole"):
        assert one["monitor/nrg_ratio"] == pytest.approx(1.0)
    lengths = np.array([3.0, 5.0])
    assert length_gain(lengths, lengths, lengths, lengths + 1).ratio == 1.0
    assert np.isnan(within_prompt_correlations([lengths * 0], [lengths]))[0]
