"""Labels for reward models from a policy's own samples, where the data set can be checked.

    python -m rlhf_jax.label_samples --config=configs/X.py --workdir=DIR

K samples for each of M problems; the data set's exact checker says which steps and which final
answers are right. Three files of one line per item: correctness.jsonl (prompt, completion,
label), pairs.jsonl (prompt, chosen, rejected: a right and a wrong sample of one problem) and
steps.jsonl (prompt, steps, labels). A part of the problems is held out whole, in files named
held_out_*.jsonl.
"""

import json
import pathlib
import random
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from rlhf_jax import program, run_folder
from rlhf_jax.data.arithmetic import label_solution
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.text.steps import split_steps
from rlhf_jax.training.keys import Purpose
from rlhf_jax.training.writer import write_json


class Sample(NamedTuple):
    """One checked completion. ``ended`` is False where it ran into the token limit."""

    prompt: str
    completion: str
    ended: bool
    correct: bool
    steps: list[str]
    labels: tuple[bool, ...]


def check(prompt: str, question: str, completion: str, ended: bool, modulus: int) -> Sample:
    """One completion with the verdict of the exact checker."""
    correct, labels = label_solution(question, completion, modulus)
    return Sample(prompt, completion, ended, correct and ended, split_steps(completion), labels)


def pairs(group: list[Sample], limit: int, rng: random.Random) -> Iterator[tuple[Sample, Sample]]:
    """Up to ``limit`` pairs of a right and a wrong sample that both ended, each text once."""
    right = {sample.completion: sample for sample in group if sample.correct}
    wrong = {s.completion: s for s in group if s.ended and not s.correct}
    both = [(a, b) for a in right.values() for b in wrong.values()]
    yield from rng.sample(both, min(limit, len(both)))


def rows_of(group: list[Sample], limit: int, rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """The lines that one problem's samples give, by file."""
    ended = [sample for sample in group if sample.ended]
    return {
        "correctness": [
            {"prompt": s.prompt, "completion": s.completion, "label": float(s.correct)}
            for s in ended
        ],
        "steps": [
            {"prompt": s.prompt, "steps": s.steps, "labels": [float(x) for x in s.labels]}
            for s in ended
            if s.steps
        ],
        "pairs": [
            {"prompt": a.prompt, "chosen": a.completion, "rejected": b.completion}
            for a, b in pairs(group, limit, rng)
        ],
    }


def check_config(config: ConfigDict) -> None:
    """Raises a ValueError for what cannot be labelled."""
    if config.data.name != "arithmetic":
        raise ValueError(
            f"data.name={config.data.name!r} has no exact checker of steps; only 'arithmetic' has"
        )
    if not 0 <= config.label.held_out < 1:
        raise ValueError(f"label.held_out={config.label.held_out}; wanted a share below 1")


def label_samples(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Samples, labels and writes; returns the summary.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    started = time.time()
    check_config(config)
    sampler = PolicySampler(config, Purpose.EVALUATE)
    if len(sampler) < config.label.problems:
        raise ValueError(
            f"label.problems={config.label.problems} but data.split={config.data.split!r} has "
            f"{len(sampler)}: a problem must not come twice"
        )
    folder = run_folder.prepare(workdir, config, {})
    held_out = round(config.label.problems * config.label.held_out)
    rng = random.Random(config.seed)
    modulus = config.data.options.modulus
    rows: dict[str, list[dict[str, Any]]] = {}
    groups = sampler.groups(config.label.problems)
    for index, group in enumerate(tqdm(groups, total=config.label.problems, unit="problem")):
        samples = [
            check(c.prompt, c.record["question"], c.completion, c.ended, modulus) for c in group
        ]
        prefix = "held_out_" if index < held_out else ""
        for name, lines in rows_of(samples, config.label.pairs, rng).items():
            rows.setdefault(prefix + name, []).extend(lines)
    for name, lines in rows.items():
        write_lines(folder / f"{name}.jsonl", lines)
    summary = {f"rows/{name}": len(lines) for name, lines in rows.items()}
    labels = [line["label"] for line in rows["correctness"]]
    summary["accuracy"] = sum(labels) / max(1, len(labels))
    summary |= run_folder.closing_facts(started)
    if jax.process_index() == 0:
        write_json(folder / "summary.json", summary)
    return summary


def write_lines(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object per line; process 0 writes."""
    if jax.process_index() == 0:
        path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


if __name__ == "__main__":
    program.run_program(label_samples)
