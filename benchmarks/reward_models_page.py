"""docs/results/reward_models.md and its figure from the runs of `benchmarks.reward_models`."""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pages import last_day, machine_and_versions, read, read_lines, table
from benchmarks.reward_models_data import PROCESSBENCH, best_writer
from rlhf_jax.data.sources import read_jsonl
from rlhf_jax.ops.reward_metrics import clustered_interval

FIGURE = "reward_models.png"
NAMES = {
    "ukp": "UKPConvArg1",
    "hh": "HH-RLHF",
    "gsm8k": "GSM8K solutions",
    "prmbench": "PRMBench",
    "bigbench_mistake": "BIG-Bench Mistake",
}
_NORMAL = 1.959964


class Spread(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def over_seeds(found: Sequence[Spread]) -> Spread:
    """The mean of some seeds' numbers on the same items, with the errors of items and of seeds.

        variance = (mean of the seeds' half widths / 1.96)² + s² / S

    The first part is not divided by the number S of seeds: they are tested on the same items. The
    second has S − 1 degrees of freedom, the sum has those of Welch and Satterthwaite (Satterthwaite
    1946, https://doi.org/10.2307/3002019), and Student's t makes the interval. It is cut at 0, 1.
    """
    values = [one.value for one in found]
    mean, seeds = statistics.fmean(values), len(values)
    items = (statistics.fmean((one.high - one.low) / 2 for one in found) / _NORMAL) ** 2
    between = statistics.variance(values) / seeds if seeds > 1 else 0.0
    freedom = (seeds - 1) * ((items + between) / between) ** 2 if between else math.inf
    wide = float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(items + between)
    return Spread(mean, max(0.0, mean - wide), min(1.0, mean + wide))


def beside(model: Spread, baseline: float) -> str:
    """How a model stands to a number that needs none."""
    if model.low > baseline:
        return "above"
    return "below" if model.high < baseline else "not told apart"


class Results:
    """The reports of one set and size over seeds.

    Args:
        folders: pipelines of one run each.
    """

    def __init__(self, folders: Sequence[pathlib.Path]):
        self.reports = [read(folder / "report/report.json") for folder in folders]
        self.cards = [read(folder / "reward/card.json") for folder in folders]
        self.summaries = [read(folder / "summary.json") for folder in folders]
        self.folders = list(folders)

    @property
    def records(self) -> int:
        """How many records were trained on."""
        return self.cards[0]["data"][0]["records"]

    def spread(self, label: str, name: str) -> Spread:
        """A number of a set with the interval over seeds and items."""
        return over_seeds([spread_of(report, label, name) for report in self.reports])

    def fixed(self, label: str, name: str) -> float:
        """A number of a set that no seed moves, such as a baseline."""
        return self.reports[0]["sets"][label]["numbers"][name]["value"]

    def seconds(self) -> list[float]:
        """What each training took, with compilation and the card."""
        return [summary["seconds/reward"] for summary in self.summaries]

    def accuracy(self, label: str) -> Spread:
        """The share of samples that are on the right side of 0."""
        return over_seeds([sample_accuracy(folder, label) for folder in self.folders])


def spread_of(report: Mapping[str, Any], label: str, name: str) -> Spread:
    """A number of a report; without an interval of its own its items count as certain."""
    found = report["sets"][label]["numbers"][name]
    value = found["value"]
    return Spread(value, *(value if found[e] is None else found[e] for e in ("low", "high")))


def sample_accuracy(folder: pathlib.Path, label: str) -> Spread:
    """The share of a run's samples whose score is above 0 where they are right, below if wrong."""
    lines = [one for one in read_lines(folder / "report/scores.jsonl") if one["set"] == label]
    hits = [
        float((score > 0) == right)
        for line in lines
        for score, right in zip(line["scores"], line["correct"], strict=True)
    ]
    groups = np.repeat(np.arange(len(lines)), [len(line["scores"]) for line in lines])
    return Spread(statistics.fmean(hits), *clustered_interval(np.array(hits), groups))


def pair_table(named: Mapping[str, Sequence[Results]]) -> str:
    """Accuracy of each size beside the length rules."""
    rows = []
    for name, results in named.items():
        for one in results:
            accuracy = one.spread("test", "accuracy")
            longer = one.fixed("test", "longer_wins")
            better = max(longer, 1 - longer)
            sides = [one.spread("test", f"accuracy_where_{w}").value for w in ("longer", "shorter")]
            said = [str(accuracy), f"{longer:.3f}", f"{1 - longer:.3f}", beside(accuracy, better)]
            sides_said = [f"{side:.3f}" for side in sides]
            rows.append([NAMES[name], f"{one.records:,}", *said, *sides_said])
    head = ["set", "training pairs", "accuracy", "longer wins", "shorter wins"]
    where = ["where the longer is better", "where the shorter is"]
    return table([*head, "beside the better rule", *where], rows)


def sample_table(results: Sequence[Results], always: float) -> str:
    """Verdicts on single solutions, and which of four to take.

    Args:
        always: the share of right ones of the writer who is right most often in training.
    """
    rows = []
    for one in results:
        best = one.spread("test", "best_of_k")
        plain = [one.fixed("test", name) for name in ("mean_correct", "longest_of_k")]
        baselines = [*plain, always, one.fixed("test", "oracle_of_k")]
        verdicts = [str(one.accuracy("test")), f"{one.fixed('test', 'majority_rate'):.3f}"]
        areas = [str(one.spread("test", "auc")), str(one.spread("test", "prompt_auc"))]
        length = f"{one.fixed('test', 'prompt_auc_longer'):.3f}"
        chosen = [str(best), *(f"{x:.3f}" for x in baselines), beside(best, always)]
        rows.append([f"{one.records:,}", *verdicts, *areas, length, *chosen])
    head = ["training solutions", "accuracy", "majority", "AUC", "AUC within questions"]
    chosen = ["best of 4", "random", "longest", "the best writer's", "any"]
    return table([*head, "that of length", *chosen, "best of 4 beside the best writer's"], rows)


def process_table(named: Mapping[str, Results]) -> str:
    """Steps and first wrong steps of the set's own test part and of ProcessBench."""
    rows = []
    for name, one in named.items():
        for label in ("test", *PROCESSBENCH):
            own = "its test part" if label == "test" else f"ProcessBench, {label}"
            used = f"{one.reports[0]['sets'][label]['counts']['used']:,}"
            f1, blind = one.spread(label, "f1"), one.fixed(label, "blind_f1")
            steps = [str(one.spread(label, "step_accuracy"))]
            steps += [f"{one.fixed(label, 'step_majority_rate'):.3f}"]
            steps += [str(one.spread(label, "step_auc"))]
            steps += [f"{one.fixed(label, 'step_auc_longer'):.3f}"]
            first = [str(f1), f"{blind:.3f}", beside(f1, blind)]
            rows.append([NAMES[name], own, used, *first, *steps])
    head = ["trained on", "tested on", "solutions", "F1", "blind F1", "F1 beside it"]
    return table([*head, "step accuracy", "majority", "step AUC", "that of length"], rows)


def setup_table(named: Mapping[str, Sequence[Results]], facts: Mapping[str, Any]) -> str:
    """What was trained on what and how long."""
    rows = []
    for name, results in named.items():
        card, own = results[-1].cards[0], facts[name]
        problems = dict(zip(("train", "dev", "test"), own["problems"], strict=True))
        sizes = [f"{own[p]:,} ({n:,})" if own[p] else "–" for p, n in problems.items()]
        shape, training = card["model"]["config"], card["training"]
        model = f"{shape['layers']} of width {shape['width']}, {card['model']['parameters']:,}"
        read_as = card["data"][0]["read"]["max_length"]
        rate = training["optimizer"]["learning_rate"]
        steps = f"{training['steps']} of {training['losses'][0]['rows']}"
        times = [seconds for one in results for seconds in one.seconds()]
        took = f"{statistics.median(times):.0f} ({max(times):.0f})"
        rows.append([NAMES[name], *sizes, model, str(read_as), steps, f"{rate:g}", took])
    parts = [f"{part} (problems)" for part in ("training", "threshold", "test")]
    head = ["set", *parts, "layers, parameters", "tokens at most", "steps of records", "rate"]
    return table([*head, "seconds a training, median (most)"], rows)


def left_out_table(named: Mapping[str, Results], hidden: Mapping[str, str]) -> str:
    """What the programs counted of the first seed's run on the whole set, as they say it.

    Args:
        hidden: folders, and what stands for them on the page.
    """
    rows = []
    for name, one in named.items():
        for label, told in one.reports[0]["sets"].items():
            counts = [f"{n:,} {what}" for what, n in told["counts"].items() if n]
            rows.append([NAMES[name], label, ", ".join(counts).replace("_", " ")])
        warned = read_text(one.folders[0] / "warnings.txt").splitlines()
        for line in dict.fromkeys(warned):  # a pipeline's rehearsal says them too
            rows.append([NAMES[name], "training", without(line, hidden)])
    return table(["set", "part", "counted"], rows)


def scored_at_most(one: Results) -> int:
    """Solutions of a file of ProcessBench that were read."""
    return max(one.reports[0]["sets"][label]["counts"]["records"] for label in PROCESSBENCH)


def without(text: str, hidden: Mapping[str, str]) -> str:
    """A text without the folders of one machine."""
    for path, name in hidden.items():
        text = text.replace(path, name)
    return text


def read_text(path: pathlib.Path) -> str:
    """A file's text."""
    return path.read_text(encoding="utf-8")


def curve(axes: Axes, title: str, what: str, points: Sequence[tuple[int, Spread]], lines) -> None:
    """A number over the records of training, and baselines as level lines."""
    sizes, found = zip(*points, strict=True)
    values = [one.value for one in found]
    reach = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
    axes.errorbar(sizes, values, yerr=reach, marker="o", capsize=4, label="model")
    for number, (name, height) in enumerate(lines.items()):
        axes.axhline(height, linestyle=("--", ":", "-.")[number], color="0.4", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_title(title)
    axes.set_xlabel("records of training")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    axes.legend()


def draw(path: pathlib.Path, named: Mapping[str, Sequence[Results]]) -> None:
    """The two sets that were trained on in several sizes."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    pairs, samples = named["ukp"], named["gsm8k"]
    points = [(one.records, one.spread("test", "accuracy")) for one in pairs]
    rules = {"the longer wins": pairs[0].fixed("test", "longer_wins"), "chance": 0.5}
    curve(left, "UKPConvArg1, unseen debates", "pair accuracy", points, rules)
    points = [(one.records, one.spread("test", "auc")) for one in samples]
    curve(right, "GSM8K, unseen questions", "AUC of correctness", points, {"chance": 0.5})
    figure.savefig(path, dpi=110)


def best_writers_share(files: pathlib.Path) -> float:
    """How often the writer is right on test questions who is so most often in training."""
    best = best_writer(read_jsonl(files / "gsm8k_train.jsonl"))
    records = read_jsonl(files / "gsm8k_test.jsonl")
    return statistics.fmean(r["is_correct"] for r in records if r["model"] == best)


def shown_command(folder: pathlib.Path, hidden: Mapping[str, str]) -> str:
    """The command of `rlhf_jax.evaluate` and the overviews of what it wrote."""
    command = without(read_text(folder / "command.txt"), hidden)
    lines = without(read_text(folder / "report.md"), hidden).splitlines()
    kept, single = [], False  # all but what is said of single sets
    for line in lines:
        single = line.startswith("### ") or (single and not line.startswith("## "))
        if not single:
            kept.append(line)
    quoted = "\n".join(f"> {line}".rstrip() for line in kept).rstrip("> \n")
    return f"    {command}\n\n{quoted}"


def write(
    path: pathlib.Path,
    folders: Mapping[str, Sequence[Sequence[pathlib.Path]]],
    workdir: pathlib.Path,
    data: pathlib.Path,
    command: str,
) -> None:
    """Writes the page and beside it the figure.

    Args:
        folders: of each set, for each size (the whole set last), the runs of all seeds.
        workdir, data: the study's folder and that of the data.
        command: what made the runs.
    """
    named = {name: [Results(runs) for runs in sizes] for name, sizes in folders.items()}
    draw(path.parent / FIGURE, named)
    path.write_text(page(named, workdir, data, command), encoding="utf-8")


def opening(named: Mapping[str, Sequence[Results]], workdir: pathlib.Path, command: str) -> str:
    """What ran, for how long, and how intervals are made."""
    summaries = [s for results in named.values() for one in results for s in one.summaries]
    seconds = sum(s["seconds"] for s in summaries)
    seconds += read(workdir / "command/summary.json")["seconds"]
    day = last_day(workdir.glob("*/summary.json"))
    return f"""# Reward models on real data

    {command}

{day}, {machine_and_versions(summaries[0])}. Written by that command, which runs what is not done
yet: {len(summaries)} trainings by `train_reward`, each measured by `evaluate_reward`, and
`rlhf_jax.evaluate` once as a user starts it; {seconds / 60:.0f} minutes in all. All are tiny,
start from random weights and train for about a minute at most, so they show what the programs do
with real data, not what reward models can do.

**Intervals** are 95 % and over {len(named["ukp"][-1].folders)} seeds and the test items. A seed
decides the first weights, the order of the records and, below the whole set, which records are
drawn (a larger draw holds the smaller ones). The variance is that of the items, as
`evaluate_reward` has it for each seed (items of one prompt depend on each other; AUC and F1 by a
bootstrap over texts; not divided by the number of seeds, as all are tested on the same items), plus
that of the seeds divided by their number; Student's t with the degrees of freedom of Welch and
Satterthwaite. *above* and *below* a baseline mean that this interval excludes it."""


def page(
    named: Mapping[str, Sequence[Results]],
    workdir: pathlib.Path,
    data: pathlib.Path,
    command: str,
) -> str:
    """The page as Markdown."""
    whole = {name: results[-1] for name, results in named.items()}
    hidden = {str(data): "DATA", str(workdir): "RUNS"}
    vocabulary = whole["ukp"].cards[0]["model"]["config"]["vocab_size"]
    return f"""{opening(named, workdir, command)}

## What is trained

Nothing of a test problem is in training: debates (UKPConvArg1), first turns (HH-RLHF) and questions
(all others) are in one part only, and PRMBench is without problems that ProcessBench has. The
tokenizer is a byte-level BPE of {vocabulary:,} tokens, made of the training parts. Every size of a
set trains for as many steps. Rates, steps and shapes were chosen by hand on parts of the training
files. DATA and RUNS stand for the folders of the command.

{setup_table(named, read(workdir / "data/facts.json"))}

## Outcome models from human pairs

A pair has no majority side: chance is 0.5. The length rules look at tokens.

{pair_table({name: named[name] for name in ("ukp", "hh")})}

![accuracy over the number of training records, with baselines]({FIGURE})

## Outcome models from right and wrong solutions: GSM8K

Four language models answered each question. *Best of 4* takes the answer with the highest score;
*the best writer's* always takes that of the model which is right most often in training, so a
reward model that only knows the writers by their style cannot beat it.

{sample_table(named["gsm8k"], best_writers_share(workdir / "data"))}

## Process models

F1 is the harmonic mean of "the first wrong step is found" and "no step of a flawless solution is
called wrong" (ProcessBench). *Blind F1* is the best guess that looks at no solution. The threshold
of a step is the one that is best on the set's own threshold part. ProcessBench was seen in no
training; of each of its files at most {scored_at_most(whole["prmbench"])} solutions, spread over
the file, were read.

{process_table({name: whole[name] for name in ("prmbench", "bigbench_mistake")})}

{ending(whole, workdir, hidden)}
"""


def ending(whole: Mapping[str, Results], workdir: pathlib.Path, hidden: Mapping[str, str]) -> str:
    """What was left out, and the command on published files."""
    return f"""## What was left out

As the programs counted it (first seed, whole set): `evaluate_reward` in its reports, `train_reward`
in its warnings. What is not named was counted too and is 0: equal sides, empty answers, prompts
that fill the window, blank wrong steps.

{left_out_table(whole, hidden)}

## The command

The process model that learnt from PRMBench (first seed), on RM-Bench and on ProcessBench's GSM8K
part as they were published. Texts without an outcome head are scored by their worst step. Of
report.md all but what is said of single sets:

{shown_command(workdir / "command", hidden)}"""
