"""The watch on a policy that follows one of two reward models, in a world of known gold.

A response is a point of 8 dimensions, and gold a fixed network of 16 tanh units of it. Two reward
models, 64 random ReLU features each, are fitted by the shipped trainer to comparisons of responses
to the start's policy, of which a share is told wrong: each to a half of its own. The policy is a
normal distribution whose mean drifts along the gradient of the first model's mean score, 60 steps
of length 0.15. Good reward models (many pairs, told right) and weak ones go the same way.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.mismatch_page import page
from rlhf_jax.mismatch_plan import Watch
from rlhf_jax.mismatch_watch import evaluation
from rlhf_jax.ops.mismatch import (
    ALARMS,
    Course,
    Thresholds,
    alarms,
    in_a_row,
    links,
    relative_divergence,
    zscores,
)
from tests.worlds import linear

DIMENSIONS, HIDDEN, FEATURES = 8, 16, 64
RIDGE = 1e-3
START, SAMPLES, STEPS, STEP = 4_000, 512, 60, 0.15
SEEDS = 8
KINDS = {"150": (150, 0.3), "400": (400, 0.25), "4000": (4_000, 0.05), "20000": (20_000, 0.0)}
WEAK = ("150", "400")


class Run(NamedTuple):
    course: Course  # one evaluation a step
    start: Course
    accuracy: float  # of the first reward model on comparisons that were not seen


class Net(NamedTuple):
    """r(x) = w · relu(xV + c)."""

    inner: np.ndarray
    bias: np.ndarray
    weights: np.ndarray

    def features(self, x):
        return np.maximum(x @ self.inner + self.bias, 0)

    def __call__(self, x):
        return self.features(x) @ self.weights

    def gradient(self, x):
        return ((x @ self.inner + self.bias > 0) * self.weights) @ self.inner.T


@functools.cache
def trainer():
    model = linear.linear_model(FEATURES, ("outcome",))
    start = linear.zero_heads(FEATURES, ("outcome",))
    return linear.trainer(model, start, {"pairs": 1.0}, RIDGE)


def reward_model(rng, gold, pairs, noise):
    """A reward model of a half of its own."""
    inner = rng.normal(size=(DIMENSIONS, FEATURES)) / math.sqrt(DIMENSIONS)
    net = Net(inner, 0.5 * rng.normal(size=FEATURES), np.zeros(FEATURES))
    first, second = rng.normal(size=(2, pairs, DIMENSIONS))
    better = (gold(first) > gold(second)) ^ (rng.random(pairs) < noise)
    rows = net.features(np.concatenate([first, second])).astype(np.float32)
    index = np.arange(pairs)
    mixture = {"pairs": linear.pairs(index, index + pairs, better)}
    kernel = trainer()(rows, mixture)["heads"]["outcome"]["kernel"]
    return net._replace(weights=np.asarray(kernel, np.float64))


def nothing(count):
    return np.full(count, math.nan)


def run(seed, pairs, noise):
    rng = np.random.default_rng(seed)
    inner = rng.normal(size=(DIMENSIONS, HIDDEN)) / math.sqrt(DIMENSIONS)
    outer = rng.normal(size=HIDDEN) / math.sqrt(HIDDEN)

    def gold(x):
        return np.tanh(x @ inner) @ outer

    first, second = (reward_model(rng, gold, pairs, noise) for _ in range(2))
    judges = (first, second, gold)
    before = rng.normal(size=(START, DIMENSIONS))
    a, b = before[: START // 2], before[START // 2 :]
    accuracy = float(np.mean((first(a) > first(b)) == (gold(a) > gold(b))))
    mean, rows = np.zeros(DIMENSIONS), []
    for _ in range(STEPS):
        x = mean + rng.normal(size=(SAMPLES, DIMENSIONS))
        rows.append([*(judge(x).mean() for judge in judges), mean @ mean / 2])
        upward = first.gradient(x).mean(axis=0)
        mean = mean + STEP * upward / np.linalg.norm(upward)
    course = Course(*np.transpose(rows), length=nothing(STEPS), refusals=nothing(STEPS))
    rest = dict(kl=np.zeros(START), length=nothing(START), refusals=nothing(START))
    return Run(course, Course(*(judge(before) for judge in judges), **rest), accuracy)


@functools.cache
def world():
    """{kind: [Run of each seed]}"""
    return {kind: [run(seed, *how) for seed in range(SEEDS)] for kind, how in KINDS.items()}


def fired(one):
    return alarms(one.course, one.start, Thresholds())["divergence"]


def z(one, name):
    return zscores(getattr(one.course, name), getattr(one.start, name))


def share(kind, fires=fired):
    return np.mean([fires(one).any() for one in world()[kind]])


@pytest.mark.parametrize("kind", WEAK)
def test_the_alarm_fires_for_weak_reward_models(kind):
    """A-CEIL-1."""
    assert share(kind) >= 0.75


def test_it_does_not_fire_for_good_ones():
    """A-CEIL-2."""
    assert share("20000") == 0
    assert share("4000") <= 0.25


def test_an_absolute_difference_fires_for_good_ones_too():
    """Why the divergence is relative to the gain."""

    def absolute(one):
        return in_a_row(z(one, "proxy") - z(one, "held_out") > 0.5) >= 5

    for kind in ("4000", "20000"):
        assert share(kind, absolute) >= share(kind) + 0.25


def test_what_the_twin_does_not_see_is_not_gold():
    """The more of the proxy's gain its twin sees, the more gold the policy has in the end."""
    ends = {kind: [z(one, "gold")[-1] for one in runs] for kind, runs in world().items()}
    means = [np.mean(ends[kind]) for kind in KINDS]
    assert means[0] < means[1] < means[2]
    apart = [relative_divergence(z(one, "proxy"), z(one, "held_out"))[-1] for one in all_runs()]
    late = [z(one, "gold")[-1] for one in all_runs()]
    assert np.corrcoef(apart, late)[0, 1] < -0.5


def test_the_alarm_is_no_rule_to_stop_by():
    """Gold goes on rising after it: whoever stops at the alarm has less than who runs on."""
    stopped, ran = [], []
    for kind in WEAK:
        for one in world()[kind]:
            if fired(one).any():
                gold = z(one, "gold")
                stopped.append(gold[np.argmax(fired(one))] / gold.max())
                ran.append(gold[-1] / gold.max())
    assert np.mean(stopped) < np.mean(ran)


def all_runs():
    return [one for runs in world().values() for one in runs]


def test_the_links_over_runs_are_those_of_the_world():
    """A point is a run: a better reward model makes a better policy and not a higher reward."""
    ends = [[one.accuracy, z(one, "proxy")[-1], z(one, "gold")[-1]] for one in all_runs()]
    found = links(*np.transpose(ends), block=1)
    assert found["reward model -> gold"].low > 0
    assert found["reward model -> policy reward"].high < found["reward model -> gold"].low
    for link in found.values():
        assert link.low <= link.value <= link.high and link.count == len(ends)


def test_the_report_has_the_three_links_with_intervals():
    """A-CEIL-3."""
    one, t = world()["150"][0], Thresholds()
    watch = Watch("a", "b", "gold", every=1, start=1, freeze=False, refusals=(), thresholds=t)
    raised, rows = alarms(one.course, one.start, t), []
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        upto = Course(*(column[: step + 1] for column in one.course))
        numbers = evaluation(watch, upto, one.start)
        numbers |= {f"monitor/alarm/{name}": float(raised[name][step]) for name in ALARMS}
        numbers |= {f"monitor/{name}": math.nan for name in ("corr_length_reward", "nrg_ratio")}
        numbers |= {"monitor/accuracy": rng.random(), "monitor/lr_scale": 1.0}
        rows.append(
            {"step": step} | {n: x if math.isfinite(x) else None for n, x in numbers.items()}
        )
    rewards = ConfigDict({name: dict(weight=0.0) for name in ("a", "b", "gold")})
    text = page(watch, rewards, rows, one.start._asdict())
    for link in ("reward model -> policy reward", "policy reward -> gold", "reward model -> gold"):
        line = next(line for line in text.splitlines() if line.startswith(f"| {link} "))
        assert line.count(" to ") == 1 and f"| {STEPS} |" in line
    assert "| divergence | (z proxy" in text and "| step " in text
