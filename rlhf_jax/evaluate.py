"""Evaluates policies and reward models on held-out problems and labels.

    python -m rlhf_jax.evaluate --config=configs/X.py --workdir=DIR

Policies: exact answers, sampling at temperature 1 and greedy, and how far the samples are from
those of the policy ``reference`` (KL in nats per completion), and what exact answers gained over it
on the same problems. Reward models: pair accuracy beside "the longer wins", AUC and balanced
accuracy of steps beside the majority rate. Intervals are 95 %. Every evaluated completion goes to
evaluation.jsonl; a table is printed. A config with ``reward_sets`` measures a reward model on
published sets: see `rlhf_jax.evaluate_reward`. One with ``best_of`` draws many samples and chooses:
see `rlhf_jax.evaluate_best_of`. One with ``benchmarks`` says what policies lost or gained on each
against their start: see `rlhf_jax.evaluate_benchmarks`.
"""

import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from rlhf_jax import averages, build, program, reward_report, roles, run_folder
from rlhf_jax.compile_watch import CompileWatch
from rlhf_jax.evaluate_benchmarks import evaluate_benchmarks
from rlhf_jax.evaluate_best_of import evaluate_best_of
from rlhf_jax.evaluate_reward import evaluate_reward
from rlhf_jax.fit import check_rows
from rlhf_jax.label_samples import write_lines
from rlhf_jax.ops.reward_metrics import clustered_interval, mean_interval
from rlhf_jax.policy_sampler import PolicySampler, check_problems, of_policy
from rlhf_jax.rewards.exact_match import is_exact
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.schema import closest, within
from rlhf_jax.training.keys import Purpose
from rlhf_jax.training.writer import write_json

# Mode -> temperature, and the prefix of its numbers in summary.json.
_MODES = {"sample": (1.0, ""), "greedy": (0.0, "greedy_")}


def policy_rows(
    stage: str,
    mode: str,
    sampler: PolicySampler,
    reference: PolicySampler | None,
    problems: int,
) -> Iterator[dict[str, Any]]:
    """One line of evaluation.jsonl per completion of one policy in one mode.

    ``kl`` is log policy - log reference of a sampled completion, in nats; None without reference.
    """
    temperature, _ = _MODES[mode]
    sampling = make_sampling(temperature=temperature)
    for first, rollouts in sampler.batches(problems, sampling):
        gaps: Iterator[float | None] = itertools.repeat(None)
        if reference is not None and temperature:
            gaps = iter(sampler.log_ratio(reference, rollouts).tolist())
        for group in sampler.decode(rollouts)[: problems - first]:
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
                    "kl": next(gaps),
                }


def accuracies(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """<stage>/accuracy and <stage>/greedy_accuracy with 95 % intervals (Wilson, over prompts)."""
    found: dict[str, list[bool]] = {}
    prompts: dict[str, list[str]] = {}
    for row in rows:
        name = f"{row['stage']}/{_MODES[row['mode']][1]}accuracy"
        found.setdefault(name, []).append(row["correct"])
        prompts.setdefault(name, []).append(row["prompt"])
    numbers = {}
    for name, correct in found.items():
        low, high = clustered_interval(np.array(correct, np.float64), np.array(prompts[name]))
        numbers |= {name: sum(correct) / len(correct), f"{name}_low": low, f"{name}_high": high}
    return numbers


def changes(rows: Iterable[Mapping[str, Any]], start: str) -> dict[str, float]:
    """<stage>/accuracy_change and <stage>/greedy_accuracy_change against the policy ``start``.

    The mean over problems of paired differences with their 95 % interval: what problems differ in
    falls out. Nothing where no start is named, or there are fewer than two problems.
    """
    found: dict[str, dict[str, dict[str, list[bool]]]] = {}
    for row in rows:
        by_stage = found.setdefault(f"{_MODES[row['mode']][1]}accuracy_change", {})
        by_stage.setdefault(row["stage"], {}).setdefault(row["prompt"], []).append(row["correct"])
    numbers = {}
    for name, by_stage in found.items():
        before = by_stage.get(start, {})
        for stage, after in by_stage.items() if len(before) > 1 else ():
            if stage == start:
                continue
            gaps = [np.mean(after[prompt]) - np.mean(before[prompt]) for prompt in before]
            mean, low, high = mean_interval(np.array(gaps))
            one = f"{stage}/{name}"
            numbers |= {one: mean, f"{one}_low": low, f"{one}_high": high}
    return numbers


def divergences(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """<stage>/kl, the mean over problems of the samples' KL, with 95 % intervals."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["kl"] is not None:
            found.setdefault(row["stage"], {}).setdefault(row["prompt"], []).append(row["kl"])
    numbers = {}
    for stage, by_prompt in found.items():
        means = [sum(values) / len(values) for values in by_prompt.values()]
        mean, low, high = mean_interval(means)
        numbers |= {f"{stage}/kl": mean, f"{stage}/kl_low": low, f"{stage}/kl_high": high}
    return numbers


def print_table(numbers: Mapping[str, float | int]) -> None:
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


def conclude(
    folder: pathlib.Path, numbers: Mapping[str, float], compiles: int, started: float
) -> dict[str, float | int]:
    """Prints the table and writes summary.json, on process 0; returns all numbers."""
    every = {**numbers, "compiles_after_warmup": compiles}
    if jax.process_index() == 0:
        print_table(every)
        write_json(folder / "summary.json", every | run_folder.closing_facts(started))
    return every


def check_config(config: ConfigDict) -> None:
    """Raises a ValueError for what cannot be evaluated; opens nothing."""
    origin = config.get("reference", "")
    if origin and origin not in config.policies:
        known = ", ".join(config.policies)
        raise ValueError(f"reference={origin!r}; wanted one of policies ({known}) or empty")
    if origin and config.problems < 2:
        raise ValueError(
            f"problems={config.problems}; wanted 2 or more, for an interval of the KL to "
            f"reference={origin!r}"
        )
    for mode in config.modes:
        if mode not in _MODES:
            near = closest(mode, _MODES)
            raise ValueError(f"modes names {mode!r}{near}; known: {', '.join(_MODES)}")
    if config.reward.init_from:
        for label, section in config.reward.sources.items():
            build.check_source(f"reward.sources.{label}", section, tuple(reward_report.KINDS))


def check_reward(
    config: ConfigDict, later: Callable[[ConfigDict], bool] = lambda section: False
) -> None:
    """Looks at the folder and the sources that the report on a reward model will read.

    Args:
        later: whether a source names what an earlier stage of a pipeline will write.

    Raises:
        ValueError: naming the folder or the source, and file and line where it is a file.
    """
    if not config.reward.init_from:
        return
    text = build.tokenizer(config)
    with within("reward.init_from"):
        run_folder.read_models(config.reward.init_from)
    averages.check_average("reward", config.reward)
    for label, section in config.reward.sources.items():
        if not later(section):
            path = f"reward.sources.{label}"
            check_rows(path, section, build.examples(path, section, text, config.seed))


def evaluate(config: ConfigDict, workdir: str) -> dict[str, float | int]:
    """Evaluates what ``config.policies`` and ``config.reward`` name; returns the numbers.

    A config with ``reward_sets`` is one of `rlhf_jax.evaluate_reward`.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    if "reward_sets" in config:
        return evaluate_reward(config, workdir)
    if "best_of" in config:
        return evaluate_best_of(config, workdir, conclude)
    if "benchmarks" in config:
        return evaluate_benchmarks(config, workdir, conclude)
    started = time.time()
    check_config(config)
    check_reward(config)
    roles.check_start("reward", config.reward.init_from)
    averages.check_starts("reward", config.reward)
    origin = config.get("reference", "")
    samplers = {}
    for stage in sorted(config.policies, key=lambda name: name != origin):  # what all start from
        own = of_policy(config, stage)
        samplers[stage] = PolicySampler(own, Purpose.EVALUATE, f"policies.{stage}")
        check_problems("problems", config.problems, samplers[stage])
    folder = run_folder.prepare(workdir, config, {})
    rows = [
        row
        for stage, sampler in samplers.items()
        for mode in config.modes
        for row in policy_rows(
            stage,
            mode,
            sampler,
            samplers[origin] if stage != origin and origin else None,
            config.problems,
        )
    ]
    write_lines(folder / "evaluation.jsonl", rows)
    numbers = accuracies(rows) | divergences(rows) | changes(rows, origin)
    compiles = sum(sampler.compiles.after_warmup for sampler in samplers.values())
    if config.reward.init_from:
        watch = CompileWatch()
        numbers |= reward_report.report(config, watch)
        compiles += watch.after_warmup
    return conclude(folder, numbers, compiles, started)


if __name__ == "__main__":
    program.run_program(evaluate)
