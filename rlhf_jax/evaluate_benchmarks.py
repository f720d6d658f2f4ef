"""What training changed on each of several benchmarks, against the policy that it started from.

    python -m rlhf_jax.evaluate --config=configs/X.py --workdir=DIR   (a config with ``benchmarks``)

A policy that learns to be paid for one thing may lose others, the "alignment tax" (Askell et al.
2021, https://arxiv.org/abs/2112.00861; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155,
section 4.2). Every policy of ``policies`` and its ``start``, the fine-tuned model, say, answers the
same prompts of each benchmark with the same noise; ``gold`` of the benchmark, a reward that needs
no model, scores the answers. For each benchmark and policy

    <benchmark>/<policy>           the mean score, with a 95 % interval over prompts
    <benchmark>/<policy>/change    its mean less that of the start, prompt by prompt: the interval
                                   is of paired differences, so what prompts differ in falls out

benchmarks.md has them as a table, evaluation.jsonl every answer.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from rlhf_jax import build, run_folder
from rlhf_jax.data.forms import check_form
from rlhf_jax.judge import check_judge, judged, make_judge
from rlhf_jax.label_samples import write_lines
from rlhf_jax.ops.reward_metrics import mean_interval, prompt_interval
from rlhf_jax.policy_sampler import PolicySampler, check_problems, of_policy, plan_sampler
from rlhf_jax.schema import closest, within
from rlhf_jax.training.keys import Purpose
from rlhf_jax.training.writer import write_text

_OWN = ("problems", "gold", "max_tokens")  # keys of a benchmark that are not of its data
_FORMS = ("template", "chat")  # one of them writes prompts


def check_config(config: ConfigDict) -> None:
    """Raises a ValueError for what cannot be evaluated; opens nothing."""
    if config.start not in config.policies:
        raise ValueError(
            f"start={config.start!r}{closest(config.start, list(config.policies))}; wanted one of "
            f"policies: {', '.join(config.policies)}"
        )
    if len(config.policies) < 2:
        raise ValueError(f"policies has {config.start!r} alone; wanted a policy beside its start")
    if not config.benchmarks:
        raise ValueError("benchmarks is empty; name one, with its data, problems and gold")
    build.check_sampling(config.rollout.sampling)
    for label, section in config.benchmarks.items():
        path = f"benchmarks.{label}"
        if section.problems < 2:
            raise ValueError(f"{path}.problems={section.problems}; wanted 2 or more")
        check_judge(f"{path}.gold", section.gold)
        with within(path):
            data = of_benchmark(config, label).data
            check_form(data.get("template"), data.get("chat"))


def of_benchmark(config: ConfigDict, label: str) -> ConfigDict:
    """The config of an evaluation on one of its benchmarks alone."""
    own, section = config.copy_and_resolve_references(), config.benchmarks[label]
    data = {k: v for k, v in section.to_dict().items() if k not in _OWN and v is not None}
    shared = own.data.to_dict()
    if any(name in data for name in _FORMS):
        shared = {name: value for name, value in shared.items() if name not in _FORMS}
    own.data = ConfigDict(shared | data)
    own.rollout.max_tokens = section.get("max_tokens", own.rollout.max_tokens)
    return own


def plan(config: ConfigDict, later: Callable[[ConfigDict], bool]) -> None:
    """Plans the samplers of all policies on all benchmarks, as a pipeline does before it starts.

    Args:
        later: whether a benchmark's data are what an earlier stage will write.
    """
    for label, section in config.benchmarks.items():
        own = of_benchmark(config, label)
        for name in config.policies if not later(own.data) else ():
            with within(f"benchmarks.{label}"):
                found = plan_sampler(of_policy(own, name), f"policies.{name}")
                check_problems("problems", section.problems, found.prompts)


def numbers_of(
    label: str, found: Mapping[str, Float[np.ndarray, "M K"]], start: str
) -> dict[str, float]:
    """The numbers of one benchmark from what each policy's samples score, by policy."""
    numbers: dict[str, float] = {}
    share = all(gold.min() >= 0 and gold.max() <= 1 for gold in found.values())

    def add(name: str, values: Float[np.ndarray, "M K"], interval) -> None:
        mean, low, high = interval(values.mean(axis=1))
        numbers.update({name: mean, f"{name}_low": low, f"{name}_high": high})

    for policy, gold in found.items():
        add(f"{label}/{policy}", gold, functools.partial(prompt_interval, share=share))
        if policy != start:
            add(f"{label}/{policy}/change", gold - found[start], mean_interval)
    return numbers


def page(config: ConfigDict, numbers: Mapping[str, float]) -> str:
    """benchmarks.md."""

    def shown(name: str, sign: str = "") -> str:
        low, high = (numbers[f"{name}_{side}"] for side in ("low", "high"))
        return f"{numbers[name]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    def verdict(name: str) -> str:
        if numbers[f"{name}_high"] < 0:
            return "lost"
        return "gained" if numbers[f"{name}_low"] > 0 else "no change seen"

    rows = [
        f"| {label} | {policy} | {shown(f'{label}/{config.start}')} | "
        f"{shown(f'{label}/{policy}')} | {shown(f'{label}/{policy}/change', '+')} | "
        f"{verdict(f'{label}/{policy}/change')} | {section.problems} |"
        for label, section in config.benchmarks.items()
        for policy in config.policies
        if policy != config.start
    ]
    return "\n".join(
        [
            "# What training changed",
            "",
            f"Against `{config.start}` (`{config.policies[config.start].init_from}`), on the same "
            f"prompts with the same noise, {config.rollout.samples} samples of each. Intervals are "
            "95 %, over prompts; those of the change are of paired differences.",
            "",
            "| benchmark | policy | start | now | change | in words | prompts |",
            "|---|---|---:|---:|---:|---|---:|",
            *rows,
            "",
        ]
    )


def evaluate_benchmarks(config: ConfigDict, workdir: str, conclude) -> dict[str, float | int]:
    """Evaluates every policy on every benchmark; returns the numbers.

    Args:
        conclude: prints and writes the numbers (see `rlhf_jax.evaluate`).

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    started = time.time()
    check_config(config)
    samplers, judges = {}, {}
    for label, section in config.benchmarks.items():
        own = of_benchmark(config, label)
        with within(f"benchmarks.{label}"):
            samplers[label] = {
                name: PolicySampler(of_policy(own, name), Purpose.EVALUATE, f"policies.{name}")
                for name in config.policies
            }
            first = samplers[label][config.start]
            check_problems("problems", section.problems, first)
        judges[label] = make_judge(f"benchmarks.{label}.gold", section.gold, first)
    folder = run_folder.prepare(workdir, config, {})
    rows: list[dict[str, Any]] = []
    numbers: dict[str, float] = {}
    compiles = 0
    for label, section in config.benchmarks.items():
        gold = {}
        for name in config.policies:
            sampler = samplers[label][name]
            found = judged(name, sampler, None, judges[label], section.problems)
            sampler.release()  # one policy's parameters at a time
            gold[name] = found.gold
            rows += [{"benchmark": label, **row} for row in found.rows]
            compiles += sampler.compiles.after_warmup
        numbers |= numbers_of(label, gold, config.start)
    write_lines(folder / "evaluation.jsonl", rows)
    if jax.process_index() == 0:
        write_text(folder / "benchmarks.md", page(config, numbers))
    return conclude(folder, numbers, compiles, started)
