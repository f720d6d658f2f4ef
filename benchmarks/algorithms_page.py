"""docs/results/algorithms.md and its figure from the runs of `benchmarks.algorithms`."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.pages import (
    Numbers,
    interval,
    last_day,
    machine_and_versions,
    read,
    read_lines,
    table,
)

FIGURE = "algorithms.png"
# Column of metrics.jsonl -> title of its panel.
CURVES = {
    "reward/exact": "gold: exact answers (trains nothing)",
    "objective/score": "learned rewards, weighted",
    "objective/kl_ref": "KL to the start (nats per completion)",
    "rollout/length": "length (tokens)",
}
MODES = {"accuracy": "sampling", "greedy_accuracy": "greedy"}


def beats(change: Numbers, name: str) -> bool:
    """Whether the whole 95 % interval of a change lies above 0."""
    return change[f"{name}_low"] > 0


def points(numbers: Numbers, name: str) -> str:
    """ "+45.6 (+43.1 to +48.1)": a change of a share, in points."""
    cells = [f"{100 * numbers[f'{name}{end}']:+.1f}" for end in ("", "_low", "_high")]
    return f"{cells[0]} ({cells[1]} to {cells[2]})"


def accuracy_rows(
    evaluations: Sequence[Numbers], methods: Sequence[str], mode: str
) -> list[list[str]]:
    """The start's accuracy, and every method's gain in points."""
    rows = [["(start)", *(interval(n, f"sft/{mode}") for n in evaluations), ""]]
    for method in methods:
        name = f"{method}/{mode}_change"
        mean = statistics.fmean(numbers[name] for numbers in evaluations)
        rows.append([method, *(points(n, name) for n in evaluations), f"{100 * mean:+.1f}"])
    return rows


def mean_of(rows: Sequence[Numbers], column: str) -> str:
    """A metric's mean; a dash where a method draws no samples."""
    if not all(column in row for row in rows):
        return "–"
    return f"{statistics.fmean(row[column] for row in rows):.2f}"


def course_rows(
    workdir: pathlib.Path, seeds: Sequence[int], evaluations: Sequence[Numbers], methods
) -> list[list[str]]:
    """Where a method ended: means over the seeds."""
    rows = []
    for method in methods:
        ends = [read_lines(workdir / f"{method}_{s}" / "metrics.jsonl")[-1] for s in seeds]
        runs = [read(workdir / f"{method}_{seed}" / "summary.json") for seed in seeds]
        rows.append(
            [
                method,
                f"{statistics.fmean(n[f'{method}/kl'] for n in evaluations):.2f}",
                *(mean_of(ends, column) for column in ("objective/score", "rollout/length")),
                f"{max(run['seconds'] for run in runs):.0f}",
                f"{max(run['peak_memory_bytes'] for run in runs) / 2**30:.2f}",
            ]
        )
    return rows


def verdict(evaluations: Sequence[Numbers], methods: Sequence[str], seeds: Sequence[int]) -> str:
    """A sentence on who does not beat the start significantly on every seed; it may be none."""
    missed = [
        f"{method}, {name}, seed {seed} ({points(numbers, f'{method}/{mode}_change')})"
        for mode, name in MODES.items()
        for method in methods
        for seed, numbers in zip(seeds, evaluations, strict=True)
        if not beats(numbers, f"{method}/{mode}_change")
    ]
    return f"Not above the start, by the whole interval: {'; '.join(missed) or 'none'}."


def draw(path: pathlib.Path, courses: Mapping[str, Sequence[Sequence[Numbers]]], samples: int):
    """Curves over samples drawn, each the mean over seeds.

    Args:
        courses: by method, the lines of each seed's metrics.jsonl.
        samples: completions of one iteration.
    """
    figure = Figure(figsize=(14, 9), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for i, (method, lines) in enumerate(courses.items()):
            if column not in lines[0][0]:
                continue
            found = [
                [row[column] for row in rows]
                for rows in zip(*lines, strict=True)
                if all(column in row for row in rows)
            ]
            means = [statistics.fmean(values) for values in found]
            drawn = [samples * (step + 1) for step in range(len(means))]
            style = ("-", "--")[i // 10]
            axes.plot(drawn, means, label=method, linestyle=style, color=f"C{i % 10}")
        axes.set_title(title)
        axes.set_xlabel("samples drawn")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def said(value) -> str:
    """A setting as the page shows it; a section as its keys and values."""
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key}={said(each)}" for key, each in value.items()) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def settings_rows(workdir: pathlib.Path, seed: int, methods: Sequence[str]) -> list[list[str]]:
    """What each method's config says that is not its default."""
    rows = []
    for method in methods:
        config = read(workdir / f"{method}_{seed}" / "config.json")
        online = "algorithm" in config
        settings = config["algorithm" if online else "dpo"]
        values = {k: v for k, v in settings.items() if (k, v) != ("name", method)}
        if "pretrain" in config.get("value", {}):
            values["value.pretrain"] = config["value"]["pretrain"]
        cell = said(values)[1:-1] or "defaults"
        optimizer = config["optimizer"]["policy"] if online else config["optimizer"]
        rows.append([method, cell, f"{optimizer['learning_rate']:.0e}"])
    return rows


def text(workdir: pathlib.Path, seeds: Sequence[int], methods: Sequence[str], command: str) -> str:
    """The page."""
    evaluations = [read(workdir / f"evaluation_{seed}" / "summary.json") for seed in seeds]
    config = read(workdir / f"{methods[0]}_{seeds[0]}" / "config.json")
    prompts, samples = config["rollout"]["prompts"], config["rollout"]["samples"]
    steps = config["train"]["steps"]
    settings = settings_rows(workdir, seeds[0], methods)
    head = ["method", *(f"seed {seed}" for seed in seeds), "mean"]
    ends = ["method", "KL", "learned reward", "length", "seconds", "GiB"]
    return f"""# Every algorithm with learned rewards, the same sample budget

{last_day(workdir.glob("*/summary.json"))}, {machine_and_versions(evaluations[0])}. Written by

    {command}

which runs what is not done yet; every number comes from a summary.json or a metrics.jsonl. For each
seed all methods start from one fine-tuned model (the quickstart's) and are paid by its two learned
rewards, outcome and process: {steps} iterations of {prompts} prompts x {samples} samples,
{steps * prompts * samples:,} completions in all. Exact answers, the gold, train nothing. Nothing
was tuned per seed; how far a method goes in so few steps depends on its learning rate and its β, so
this ranks no papers. DAPO draws no group again here: that would be more samples. Offline DPO
(`dpo`) draws none and reads no reward model: its pairs are what the outcome reward learnt from.
Where `value.pretrain` stands, the policy rests in those iterations and their samples count too.

## Settings

{table(["method", "settings", "learning rate"], settings)}

## Exact answers on problems of the test split

Points gained over the start on the same problems, with the 95 % interval of the mean of paired
differences. {verdict(evaluations, methods, seeds)}

Sampling at temperature 1:

{table(head, accuracy_rows(evaluations, methods, "accuracy"))}

Greedy:

{table(head, accuracy_rows(evaluations, methods, "greedy_accuracy"))}

![gold, learned reward, KL and length over samples drawn](algorithms.png)

## Where they ended

Means over seeds: KL of samples on test problems (nats per completion); learned reward and length in
the last iteration; the slowest run's seconds and the largest run's memory.

{table(ends, course_rows(workdir, seeds, evaluations, methods))}
"""


def write(
    page: pathlib.Path,
    workdir: pathlib.Path,
    seeds: Sequence[int],
    methods: Sequence[str],
    command: str,
) -> None:
    """Writes the page and, beside it, the figure."""
    courses = {
        name: [read_lines(workdir / f"{name}_{seed}" / "metrics.jsonl") for seed in seeds]
        for name in methods
    }
    rollout = read(workdir / f"{methods[0]}_{seeds[0]}" / "config.json")["rollout"]
    draw(page.parent / FIGURE, courses, rollout["prompts"] * rollout["samples"])
    page.write_text(text(workdir, seeds, methods, command), encoding="utf-8")
