"""The picture of a pipeline: what happened to the policy while it trained, and what each stage
is worth.

Rewards of weight 0 are metrics that train nothing: they are what the trained rewards stand for
("gold") and get a panel of their own beside them. Where the trained reward rises and gold falls,
the reward is over-optimised (Gao et al., 2022, https://arxiv.org/abs/2210.10760).
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from rlhf_jax import run_folder

Rows = Sequence[Mapping[str, float | int | None]]
# Column of metrics.jsonl -> title of its panel.
_SINGLE = {
    "objective/kl_ref": "KL to the reference (nats per completion)",
    "rollout/length": "length (tokens)",
}
# Ending of a number of an evaluation -> its label.
_ENDINGS = {"accuracy": "sampling", "greedy_accuracy": "greedy", "gold": "gold"}


def read_rows(path: pathlib.Path) -> Rows:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reward_columns(rewards: Mapping[str, Mapping]) -> tuple[dict[str, str], dict[str, str]]:
    """(trained, gold): columns of metrics.jsonl by reward label, by whether they have a weight."""
    trained, gold = {"sum, weighted": "objective/score"}, {}
    for label, section in rewards.items():
        (trained if section["weight"] else gold)[label] = f"reward/{label}"
    return trained, gold


def _lines(axes: Axes, rows: Rows, columns: Mapping[str, str], title: str) -> None:
    for label, column in columns.items():
        found = [(row["step"] + 1, row[column]) for row in rows if row.get(column) is not None]
        if found:
            axes.plot(*zip(*found, strict=True), label=label)
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    if len(columns) > 1:
        axes.legend()


def _bars(
    axes: Axes, numbers: Mapping[str, float | int], stages: Sequence[str], title: str
) -> None:
    """One group of bars per stage, with 95 % intervals."""
    kinds = [e for e in _ENDINGS if any(f"{stage}/{e}" in numbers for stage in stages)]
    width = 0.8 / max(1, len(kinds))
    for j, ending in enumerate(kinds):
        names = [(i, f"{s}/{ending}") for i, s in enumerate(stages) if f"{s}/{ending}" in numbers]
        places = [i + (j - (len(kinds) - 1) / 2) * width for i, _ in names]
        heights = [numbers[name] for _, name in names]
        reach = [
            [abs(numbers[f"{name}{side}"] - numbers[name]) for _, name in names]
            for side in ("_low", "_high")
        ]
        bars = axes.bar(places, heights, width, yerr=reach, capsize=4, label=_ENDINGS[ending])
        axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.set_xticks(range(len(stages)), stages)
    axes.set_ylim(0, 1)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def draw(
    path: pathlib.Path,
    rows: Rows,
    rewards: Mapping[str, Mapping],
    numbers: Mapping[str, float | int],
    stages: Sequence[str],
) -> None:
    """Draws rewards, gold, KL and length over iterations and the evaluation per stage.

    Args:
        path: the picture to write; its ending is the format.
        rows: the lines of the policy run's metrics.jsonl.
        rewards: the policy run's ``rewards`` section: label -> values with a ``weight``.
        numbers: the evaluation's numbers with ``_low`` and ``_high``.
        stages: the policies that were evaluated, in the order of the picture.
    """
    trained, gold = reward_columns(rewards)
    # Without pyplot: no display is asked for, and a notebook's own figures are left alone.
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    places = iter(figure.subplots(2, 3).flat)
    _lines(next(places), rows, trained, "reward that trains")
    if gold:
        _lines(next(places), rows, gold, f"gold: {', '.join(gold)} (trains nothing)")
    for column, title in _SINGLE.items():
        _lines(next(places), rows, {column: column}, title)
    _bars(next(places), numbers, stages, "evaluation, 95 % intervals")
    for rest in places:
        rest.set_axis_off()
    figure.savefig(path, dpi=120)


def report(folder: pathlib.Path, stages: Mapping[str, ConfigDict]) -> pathlib.Path | None:
    """Draws ``folder``/report.png if a policy was trained and evaluated; returns its path.

    Args:
        folder: of the pipeline, with one folder for each stage.
        stages: the pipeline's stages by name, each with its ``program`` and ``config``.
    """
    by_program = {stage.program: name for name, stage in stages.items()}
    judged = by_program.get("evaluate", by_program.get("evaluate_gold"))
    trained = by_program.get("train_policy")
    if trained is None or judged is None:
        return None
    numbers = run_folder.results(run_folder.read_json(folder / judged / "summary.json"))
    path = folder / "report.png"
    rewards = stages[trained].config.rewards.to_dict()
    config = stages[judged].config
    policies = sorted(config.policies, key=lambda name: name != config.get("reference", ""))
    draw(path, read_rows(folder / trained / "metrics.jsonl"), rewards, numbers, policies)
    return path
