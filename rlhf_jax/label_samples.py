"""Labels for reward models from a policy's own samples, by an exact checker or by a reward.

    python -m rlhf_jax.label_samples --config=configs/X.py --workdir=DIR

K samples for each of M problems, in files of one line per item. The exact checker of the arithmetic
task says which steps and which final answers are right: correctness.jsonl (prompt, completion,
label), pairs.jsonl (prompt, chosen, rejected: a right and a wrong sample of one problem) and
steps.jsonl (prompt, steps, labels). For any data, ``label.reward`` names a reward that needs no
model (``dict(name="keywords", ...)``): scores.jsonl (prompt, completion, truncated, score) and
pairs.jsonl, the higher score chosen, ties and differences below ``label.margin`` left out. A part
of the problems is held out whole, in files named held_out_*.jsonl. Where ``data.chat`` names a
field of messages, lines hold it too. ``label.shuffle=True`` is a control: labels for training are
dealt out anew at random, held-out ones stay true.
"""

import json
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from rlhf_jax import label_scores, program, run_folder
from rlhf_jax.data.arithmetic import Options, label_solution, well_formed
from rlhf_jax.judge import check_judge, make_judge
from rlhf_jax.label_shuffle import shuffled
from rlhf_jax.policy_sampler import PolicySampler, check_problems
from rlhf_jax.text.chat_template import read_messages
from rlhf_jax.text.steps import split_steps
from rlhf_jax.training.keys import Purpose
from rlhf_jax.training.writer import write_json, write_parts
from rlhf_jax.types import Rollouts

Rows = dict[str, list[dict[str, Any]]]  # lines by file
Labeller = Callable[[Rollouts], Iterator[Rows]]  # the lines of each problem of a batch


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
    """Up to ``limit`` pairs of a right and a wrong sample, each text once.

    Both ended by themselves and are well-formed: a pair asks for the arithmetic, not for the form.
    """
    fit = [sample for sample in group if sample.ended and well_formed(sample.completion)]
    right = {sample.completion: sample for sample in fit if sample.correct}
    wrong = {sample.completion: sample for sample in fit if not sample.correct}
    both = [(a, b) for a in right.values() for b in wrong.values()]
    yield from rng.sample(both, min(limit, len(both)))


def rows_of(group: list[Sample], limit: int, rng: random.Random) -> Rows:
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
    label = config.label
    if "reward" not in label and config.data.name != "arithmetic":
        raise ValueError(
            f"data.name={config.data.name!r} has no exact checker of steps, only 'arithmetic' has; "
            "set label.reward=dict(name=...) to a reward whose scores make the pairs"
        )
    if not 0 <= label.held_out < 1:
        raise ValueError(f"label.held_out={label.held_out}; wanted a share below 1")
    if label.get("margin", 0.0) < 0:
        raise ValueError(f"label.margin={label.margin}; wanted 0 or a difference of scores")
    if label.get("margin", 0.0) and "reward" not in label:
        raise ValueError(f"label.margin={label.margin} needs label.reward, whose scores differ")
    if "reward" in label:
        check_judge("label.reward", label.reward)


def by_checker(config: ConfigDict, sampler: PolicySampler) -> Labeller:
    """Labels of the data set's exact checker: correctness, pairs and steps."""
    rng, limit = random.Random(config.seed), config.label.pairs
    modulus = Options(**config.data.get("options", {})).modulus

    def label(rollouts: Rollouts) -> Iterator[Rows]:
        for group in sampler.decode(rollouts):
            samples = [
                check(c.prompt, c.record["question"], c.completion, c.ended, modulus) for c in group
            ]
            yield rows_of(samples, limit, rng)

    return label


def by_reward(config: ConfigDict, sampler: PolicySampler) -> Labeller:
    """Labels from the scores of ``label.reward``: scores and pairs."""
    judge = make_judge("label.reward", config.label.reward, sampler)
    rng, limit = random.Random(config.seed), config.label.pairs
    margin, chat = config.label.get("margin", 0.0), config.data.get("chat")

    def label(rollouts: Rollouts) -> Iterator[Rows]:
        scores = iter(judge(rollouts).tolist())
        for group in sampler.decode(rollouts):
            scored = [label_scores.Scored(sample, next(scores)) for sample in group]
            rows = label_scores.rows_of(scored, limit=limit, margin=margin, rng=rng)
            yield with_messages(rows, group[0].record, chat)

    return label


def with_messages(rows: Rows, record: Mapping[str, Any], chat: str | None) -> Rows:
    """Lines that hold the dialogue of their prompt under ``chat`` too: its text alone, without the
    special tokens between turns, could not be written by a chat template again."""
    if chat is None:
        return rows
    messages = read_messages(record[chat], chat)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {file: [{**row, chat: messages} for row in lines] for file, lines in rows.items()}


def label_samples(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Samples, labels and writes; returns the summary.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    started = time.time()
    check_config(config)
    sampler = PolicySampler(config, Purpose.EVALUATE)
    problems = config.label.problems
    check_problems("label.problems", problems, sampler)
    label = (by_reward if "reward" in config.label else by_checker)(config, sampler)
    folder = run_folder.prepare(workdir, config, {})
    held_out = round(problems * config.label.held_out)
    rows: Rows = {}
    with tqdm(total=problems, unit="problem") as bar:
        for first, rollouts in sampler.batches(problems):
            for index, found in zip(range(first, problems), label(rollouts), strict=False):
                prefix = "held_out_" if index < held_out else ""
                for name, lines in found.items():
                    rows.setdefault(prefix + name, []).extend(lines)
                bar.update()
    if config.label.get("shuffle", False):
        rows = shuffled(rows, random.Random(config.seed))
    for name, lines in rows.items():
        write_lines(folder / f"{name}.jsonl", lines)
    summary = counts(rows)
    summary["compiles_after_warmup"] = sampler.compiles.after_warmup
    summary |= run_folder.closing_facts(started)
    if jax.process_index() == 0:
        write_json(folder / "summary.json", summary)
    return summary


def counts(rows: Rows) -> dict[str, Any]:
    """Lines by file, and the mean of what the training files say."""
    numbers: dict[str, Any] = {f"rows/{name}": len(lines) for name, lines in rows.items()}
    for file, field, name in (("correctness", "label", "accuracy"), ("scores", "score", "score")):
        if file in rows:
            values = [line[field] for line in rows[file]]
            numbers[name] = sum(values) / max(1, len(values))
    return numbers


def write_lines(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line, all of them or no file; process 0 writes."""
    lines = (json.dumps(row, sort_keys=True) + "\n" for row in rows)
    if jax.process_index() == 0:
        write_parts(path, lines)
    else:
        for _ in lines:  # what makes the rows may need all processes
            pass


if __name__ == "__main__":
    program.run_program(label_samples)
