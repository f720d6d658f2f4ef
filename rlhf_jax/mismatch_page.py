"""report.md of a watched policy run: alarms, links with intervals, and the run's course."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import run_folder
from rlhf_jax.mismatch_plan import Watch
from rlhf_jax.mismatch_watch import KEY, LOOK
from rlhf_jax.ops.mismatch import ALARMS, Link, links
from rlhf_jax.policy_plan import PolicyPlan
from rlhf_jax.report import Rows, read_rows
from rlhf_jax.training.writer import write_text
from rlhf_jax.types import RunState

_LINES = 40  # of the table of the course
_COLUMNS = {
    "z proxy": "z_proxy",
    "z held-out": "z_held_out",
    "divergence": "divergence",
    "z gold": "z_gold",
    "corr. with gold": "corr_reward_gold",
    "accuracy": "accuracy",
    "KL": "kl",
    "length": "length",
    "corr. with length": "corr_length_reward",
    "NRG ratio": "nrg_ratio",
    "refusals": "refusals",
}


def write(folder: pathlib.Path, plan: PolicyPlan, state: RunState) -> None:
    """Writes ``folder``/report.md; nothing where nothing is watched."""
    if plan.watch is None or jax.process_index() != 0:
        return
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "monitor/divergence" in row]
    start = {name: np.asarray(found) for name, found in state.controllers[KEY]["start"].items()}
    write_text(folder / "report.md", page(plan.watch, plan.config.rewards, rows, start))


def page(watch: Watch, rewards: ConfigDict, rows: Rows, start: Mapping[str, np.ndarray]) -> str:
    """The whole page.

    Args:
        rewards: sections by label.
        rows: the lines of metrics.jsonl that hold an evaluation.
        start: what the initial policy's completions are, by column of `Course`.
    """
    lines = [
        "# Does the reward still say what it stands for?",
        "",
        *_facts(watch, rewards, rows, start),
        "",
        "## Alarms",
        "",
        *_alarms(watch, rows),
        "",
        "## Links",
        "",
        *_links(watch, rewards, rows),
        "",
        "## Course",
        "",
        *_course(watch, rows),
    ]
    return "\n".join(lines) + "\n"


def _facts(
    watch: Watch, rewards: ConfigDict, rows: Rows, start: Mapping[str, np.ndarray]
) -> list[str]:
    """What is compared, and with what."""
    said = [f"- proxy, which trains: `{watch.proxy}`{_mean(start['proxy'])}"]
    for key, label, role in (
        ("held_out", watch.held_out, "held-out twin"),
        ("gold", watch.gold, "gold"),
    ):
        given = f"`{label}`{_mean(start[key])}" if label else "none, so nothing is said of it"
        said.append(f"- {role}: {given}")
    count = len(start["length"])
    said += [
        f"- {len(rows)} evaluations, each the mean of {watch.every} steps of training",
        f"- start: {count} completions of the initial policy, "
        f"{np.mean(start['length'], dtype=np.float64):.1f} tokens, "
        f"{100 * np.mean(start['refusals'], dtype=np.float64):.1f} % refusals; z is in its "
        "standard deviations from its mean",
    ]
    for label in (watch.proxy, watch.held_out):
        if label:
            said.append(f"- `{label}` on held-out data, accuracy: {_trained(rewards[label])}")
    return said


def _mean(found: np.ndarray) -> str:
    found = found.astype(np.float64)
    return f" (start: {found.mean():.3g}, standard deviation {found.std():.3g})"


def _trained(section: ConfigDict) -> str:
    """What the folder that a reward starts from says of its accuracy."""
    folder = section.get("init_from", "")
    path = pathlib.Path(folder) / "summary.json"
    if not folder or not path.is_file():
        return "unknown, as it does not start from the folder of a run that ended"
    found = {
        name.removeprefix("eval/").removesuffix("/accuracy"): number
        for name, number in run_folder.results(run_folder.read_json(path)).items()
        if name.startswith("eval/") and name.endswith("/accuracy") and number is not None
    }
    said = ", ".join(f"{name} {number:.3f}" for name, number in sorted(found.items()))
    return said or f"unknown, as {path} holds no eval/.../accuracy"


def _alarms(watch: Watch, rows: Rows) -> list[str]:
    """Which alarms fired and when; how each is defined."""
    t = watch.thresholds
    rules = {
        "divergence": f"(z proxy - z held-out) / max(z proxy, 0.5) > {t.divergence}, "
        f"{t.in_a_row} evaluations in a row",
        "gold": f"correlation of reward and gold over {t.window} evaluations < 0",
        "kl": "off" if t.kl_max is None else f"KL > {t.kl_max} nats per completion",
        "length": f"length > {t.length} times that of the start",
        "refusals": f"refusals > {t.refusals} times those of the start",
        "diverged": f"proxy below the start, {t.in_a_row} evaluations in a row"
        + ("" if t.kl_target is None else f", or KL > 10 times {t.kl_target}"),
    }
    rules |= {} if watch.held_out else {"divergence": "off: no held-out reward model"}
    rules |= {} if watch.gold else {"gold": "off: no gold"}
    table = []
    for name in ALARMS:
        steps = [row["step"] for row in rows if row[f"monitor/alarm/{name}"]]
        when = f"step {steps[0]}, last at {steps[-1]}" if steps else "never"
        count = f"{len(steps)} of {len(rows)}"
        table.append([name, rules[name], when, count, LOOK[name] if steps else ""])
    said = (
        "An alarm asks for somebody to look. It is no rule to stop by: where this was tried with "
    )
    said += "a known gold, the policy mostly went on getting better after the first one."
    frozen = [row["step"] for row in rows if not row["monitor/lr_scale"]]
    if frozen:
        said += f" The learning rate is 0 after step {frozen[0]} (`freeze`)."
    headings = ["alarm", "rule", "first", "evaluations", "look"]
    return [said, "", *_table(headings, table)]


def _links(watch: Watch, rewards: ConfigDict, rows: Rows) -> list[str]:
    """The three links of Lambert and Calandra along this run, each with its interval or the
    reason why there is none."""
    accuracy, reward, gold = (_column(rows, name) for name in ("accuracy", "z_proxy", "z_gold"))
    judge = watch.gold or watch.held_out
    missing = {
        "reward model -> policy reward": "" if judge else "no gold and no held-out reward model",
        "policy reward -> gold": "" if watch.gold else "no gold",
        "reward model -> gold": "" if watch.gold else "no gold",
    }
    table = [
        [
            name,
            str(link.count),
            f"cannot be computed: {missing[name]}" if missing[name] else _said(link),
        ]
        for name, link in links(accuracy, reward, gold).items()
    ]
    by = f"`{judge}`" if judge else "nothing"
    return [
        "Pearson's correlations over the evaluations of this run, with 95 % intervals of a "
        "bootstrap over blocks of them. The reward model is judged by how often it orders two "
        f"completions of one prompt as {by} does, on the policy's newest completions "
        "(`monitor/accuracy`). One run has one reward model: how the accuracy of a reward model "
        "after its training goes with what a policy gains from it cannot be computed from it, and "
        "asks for several reward models with a run each.",
        "",
        *_table(["link", "evaluations", "correlation"], table),
    ]


def _said(link: Link) -> str:
    if math.isnan(link.value):
        return "cannot be computed: too few evaluations, or one of the two does not vary"
    if math.isnan(link.low):
        return f"{link.value:.2f} (too few evaluations for an interval)"
    return f"{link.value:.2f} ({link.low:.2f} to {link.high:.2f})"


def _course(watch: Watch, rows: Rows) -> list[str]:
    """Evaluations, evenly spaced where they are many; the last one is always there."""
    if not rows:
        return [f"No evaluation yet: the first one is after {watch.every} steps."]
    stride = math.ceil(len(rows) / _LINES)
    kept = rows[(len(rows) - 1) % stride :: stride]
    table = [
        [
            str(row["step"]),
            *(_number(row[f"monitor/{name}"]) for name in _COLUMNS.values()),
            ", ".join(name for name in ALARMS if row[f"monitor/alarm/{name}"]),
        ]
        for row in kept
    ]
    said = f"One of {stride} evaluations; all" if stride > 1 else "All"
    return [
        f"{said} are in `metrics.jsonl` as `monitor/...`. A dash was not measured.",
        "",
        *_table(["step", *_COLUMNS, "alarms"], table),
    ]


def _column(rows: Rows, name: str) -> np.ndarray:
    found = [row[f"monitor/{name}"] for row in rows]
    return np.array([math.nan if x is None else x for x in found], np.float64)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
