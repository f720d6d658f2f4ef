"""docs/results/quickstart.md from the summaries of `benchmarks.quickstart_study`."""

import math
import pathlib
from collections.abc import Callable, Sequence

from benchmarks.pages import (
    Numbers,
    interval,
    last_day,
    machine_and_versions,
    read,
    read_lines,
    table,
)

FIGURES = {"main": "quickstart.png", "low_kl": "quickstart_low_kl.png"}
EDGE = 5  # iterations at either end of a run over which a metric is averaged
WANTED = """Wanted are: fine-tuning between 30 and 65 % exact, gains of at least 30
points (sampling) and 25 (greedy), less than 3 for the controls; a pair accuracy of at least 0.80
and 10 points above both length rules; a step AUC of at least 0.85 and a balanced accuracy of at
least 0.80; under 600 seconds and 4 GiB, nothing compiled late."""
NOT_RUN = "not run"
CONTROL_LIMIT = 3  # points that a control must not gain
MODES = {"sampling": "accuracy", "greedy": "greedy_accuracy"}


def points(after: Numbers, one: str, before: Numbers, other: str) -> str:
    """A difference of two shares in points, with the 95 % interval made of both Wilson intervals
    (Newcombe, Statistics in Medicine 17, 1998, method 10)."""
    a, b = after[one], before[other]
    down = math.hypot(a - after[f"{one}_low"], before[f"{other}_high"] - b)
    up = math.hypot(after[f"{one}_high"] - a, b - before[f"{other}_low"])
    low, middle, high = (100 * x for x in (a - b - down, a - b, a - b + up))
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def gain(numbers: Numbers, name: str) -> str:
    """The policy's accuracy less that of its start, in points."""
    return points(numbers, f"policy/{name}", numbers, f"sft/{name}")


def accuracy_rows(main: Sequence[Numbers]) -> list[list[str]]:
    """Exact answers before and after."""
    rows = []
    for mode, name in MODES.items():
        rows.append([f"fine-tuned, {mode}", *(interval(n, f"sft/{name}") for n in main)])
        rows.append([f"policy, {mode}", *(interval(n, f"policy/{name}") for n in main)])
        rows.append([f"gain, {mode} (points)", *(gain(n, name) for n in main)])
    return rows


def control_rows(
    main: Sequence[Numbers], longer: Sequence[Numbers | None], shuffled: Sequence[Numbers | None]
) -> list[list[str]]:
    """What a fifth more fine-tuning gains, and what shuffled labels gain, in points."""
    rows = []
    for mode, name in MODES.items():
        pairs = zip(longer, main, strict=True)
        both = f"sft/{name}"
        more = [points(a, both, b, both) if a else NOT_RUN for a, b in pairs]
        rows.append([f"20 % more fine-tuning, {mode}", *more])
    for mode, name in MODES.items():
        none = [gain(n, name) if n else NOT_RUN for n in shuffled]
        rows.append([f"shuffled labels, {mode}", *none])
    return rows


def above_limit(rows: Sequence[Sequence[str]], seeds: Sequence[int]) -> str:
    """A sentence on the controls that gain 3 points or more; it may be that none does."""
    found = [
        f"{label} of seed {seed}, {cell}"
        for label, *cells in rows
        for seed, cell in zip(seeds, cells, strict=True)
        if cell != NOT_RUN and float(cell.partition(" ")[0]) >= CONTROL_LIMIT
    ]
    return f"At or above {CONTROL_LIMIT} points: {'; '.join(found) or 'none'}."


def reward_rows(main: Sequence[Numbers]) -> list[list[str]]:
    """The reward models on held-out labels, beside what needs no model."""
    names = {
        "outcome: pair accuracy": "outcome_model/pair_accuracy",
        '"the longer wins"': "outcome_model/longer_wins",
        '"the shorter wins"': "outcome_model/shorter_wins",
        "outcome: AUC of correctness": "outcome_model/correctness_auc",
        "process: AUC of steps": "process_model/step_auc",
        "process: balanced accuracy of steps": "process_model/balanced_accuracy",
        "majority rate of step labels": "process_model/majority_rate",
    }
    return [[label, *(interval(n, name) for n in main)] for label, name in names.items()]


def cost_rows(main: Sequence[Numbers]) -> list[list[str]]:
    """KL, time, memory and late compilation."""
    shown: dict[str, Callable[[Numbers], str]] = {
        "KL of the policy (nats per completion)": lambda n: interval(n, "policy/kl", 2),
        "seconds": lambda n: f"{n['seconds']:.0f}",
        "peak memory (GiB)": lambda n: f"{n['peak_memory_bytes'] / 2**30:.2f}",
        "programs compiled after warm-up": lambda n: f"{n['compiles_after_warmup']}",
    }
    return [[label, *(show(n) for n in main)] for label, show in shown.items()]


def edges(folder: pathlib.Path, name: str) -> tuple[float, float, float]:
    """A metric's mean over the first and the last iterations of a policy run, and its highest."""
    values = [row[name] for row in read_lines(folder / "policy/metrics.jsonl")]
    windows = [values[i : i + EDGE] for i in range(max(1, len(values) - EDGE + 1))]
    means = [sum(window) / len(window) for window in windows]
    return means[0], max(means), means[-1]


def over_optimised(folder: pathlib.Path) -> str:
    """The run with a tenth of the KL weight: what was paid, what it was worth."""
    names = {
        "what is paid (`objective/score`)": "objective/score",
        "exact answers (`reward/exact`)": "reward/exact",
        "KL (`objective/kl_ref`)": "objective/kl_ref",
    }
    rows = [[label, *(f"{x:.3f}" for x in edges(folder, name))] for label, name in names.items()]
    head = ["metric", f"first {EDGE} iterations", f"highest {EDGE} in a row", f"last {EDGE}"]
    low = read(folder / "summary.json")
    iterations = len(read_lines(folder / "policy/metrics.jsonl"))
    return f"""## A tenth of the KL weight

The first seed's fine-tuned and reward models, PPO with `algorithm.kl_coef` divided by ten, for
{iterations} iterations, so that one sees where it leads. Exact answers are logged beside the
rewards (a reward of weight 0) and train nothing. On test problems it ends at
{interval(low, "policy/accuracy")} when sampling and {interval(low, "policy/greedy_accuracy")}
greedy, {interval(low, "policy/kl", 1)} nats from where it started.

{table(head, rows)}"""


def page(workdir: pathlib.Path, seeds: Sequence[int], command: str) -> str:
    """The whole page. The main runs must be there; controls that are not say so."""

    def found(kind: str) -> list[Numbers | None]:
        paths = [workdir / f"{kind}_{seed}" / "summary.json" for seed in seeds]
        return [read(path) if path.is_file() or kind == "main" else None for path in paths]

    main, longer, shuffled = map(found, ("main", "longer", "shuffled"))
    controls = control_rows(main, longer, shuffled)
    head = ["", *(f"seed {seed}" for seed in seeds)]
    return f"""# The quickstart: three seeds, controls, and what a smaller KL weight does

{last_day(workdir.glob("*/summary.json"))}, {machine_and_versions(main[0])}. Written by

    {command}

which runs what is not done yet; every number below comes from a summary.json or, for the last
table, from a metrics.jsonl. {WANTED}

## Exact answers

Problems of the test split, on which nothing was trained; 95 % intervals (Wilson, and of differences
Newcombe). Sampling is at temperature 1. PPO saw the learned rewards only.

{table(head, accuracy_rows(main))}

![rewards, gold accuracy, KL and length over iterations; accuracy per stage](quickstart.png)

## Controls

Points gained over the fine-tuned model of the main run. *20 % more fine-tuning* says whether
fine-tuning was at its end; *shuffled labels* trains the reward models on the same samples with
their labels dealt out anew, and PPO against them. Such models say about the same of every answer,
and as the reward is a probability, not a score on a scale of its own, the KL holds the policy where
it was (with standardised scores it wandered: quickstart_calibration.md).

{table(head, controls)}

{above_limit(controls, seeds)}

## Reward models

On labels of problems that were held out. Both sides of a pair are well-formed and ended by
themselves. Intervals are over pairs (Wilson) or texts (bootstrap); of one problem there are up to
four of either, which count as independent.

{table(head, reward_rows(main))}

## Cost

{table(head, cost_rows(main))}

{over_optimised(workdir / f"low_kl_{seeds[0]}")}

![the same with a tenth of the KL weight](quickstart_low_kl.png)
"""
