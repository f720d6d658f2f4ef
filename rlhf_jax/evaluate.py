"""Evaluates policies and reward models on held-out problems and labels.

    python -m rlhf_jax.evaluate --config=configs/X.py --workdir=DIR

Policies: exact answers, sampling at temperature 1 and greedy, with 95 % intervals. Reward models:
pair accuracy beside "the longer wins", AUC and balanced accuracy of steps beside the majority
rate. Every evaluated completion goes to evaluation.jsonl; a table is printed.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from rlhf_jax import program, reward_report, run_folder
from rlhf_jax.label_samples import write_lines
from rlhf_jax.ops.reward_metrics import wilson_interval
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.rewards.exact_match import is_exact
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.training.keys import Purpose
from rlhf_jax.training.writer import write_json

# Mode -> temperature, and the prefix of its numbers in summary.json.
_MODES = {"sample": (1.0, ""), "greedy": (0.0, "greedy_")}


def policy_rows(
    stage: str, mode: str, sampler: PolicySampler, problems: int
) -> Iterable[dict[str, Any]]:
    """One line of evaluation.jsonl per completion of one policy in one mode."""
    temperature, _ = _MODES[mode]
    for group in sampler.groups(problems, make_sampling(temperature=temperature)):
        # Greedy samples of one prompt are all the same: one is enough.
        for sample in group if temperature else group[:1]:
            answer = str(sample.record["answer"])
            yield {
                "stage": stage,
                "mode": mode,
                "prompt": sample.prompt,
                "expression": sample.record.get("expression"),
                "completion": sample.completion,
                "correct": sample.ended and is_exact(sample.completion, answer),
            }


def accuracies(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """<stage>/accuracy and <stage>/greedy_accuracy with 95 % intervals (Wilson)."""
    found: dict[str, list[bool]] = {}
    for row in rows:
        name = f"{row['stage']}/{_MODES[row['mode']][1]}accuracy"
        found.setdefault(name, []).append(row["correct"])
    numbers = {}
    for name, correct in found.items():
        low, high = wilson_interval(sum(correct), len(correct))
        numbers |= {name: sum(correct) / len(correct), f"{name}_low": low, f"{name}_high": high}
    return numbers


def print_table(numbers: Mapping[str, float]) -> None:
    """The numbers with their intervals, where they have one."""
    table = Table(title="evaluation")
    for column, side in (("what", "left"), ("value", "right"), ("95 % interval", "right")):
        table.add_column(column, justify=side)
    for name, number in numbers.items():
        if name.endswith(("_low", "_high")):
            continue
        low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        table.add_row(name, f"{number:.3f}", interval)
    Console().print(table)


def evaluate(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Evaluates what ``config.policies`` and ``config.reward`` name; returns the numbers.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    started = time.time()
    samplers = {}
    for stage, section in config.policies.items():
        own = config.copy_and_resolve_references()
        own.model.init_from = section.init_from
        samplers[stage] = PolicySampler(own, Purpose.EVALUATE)
        if len(samplers[stage]) < config.problems:
            raise ValueError(
                f"problems={config.problems} but data.split={config.data.split!r} has "
                f"{len(samplers[stage])}"
            )
    folder = run_folder.prepare(workdir, config, {})
    rows = [
        row
        for stage, sampler in samplers.items()
        for mode in config.modes
        for row in policy_rows(stage, mode, sampler, config.problems)
    ]
    write_lines(folder / "evaluation.jsonl", rows)
    numbers = accuracies(rows)
    if config.reward.init_from:
        numbers |= reward_report.report(config)
    if jax.process_index() == 0:
        print_table(numbers)
        write_json(folder / "summary.json", numbers | run_folder.closing_facts(started))
    return numbers


if __name__ == "__main__":
    program.run_program(evaluate)
