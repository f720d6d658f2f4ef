"""Labels of steps without people: from every prefix of a solution, does the policy get there?

    python -m rlhf_jax.label_steps --config=configs/label_steps.py --workdir=DIR

Math-Shepherd (Wang et al. 2023, https://arxiv.org/abs/2312.08935). Solutions are cut into steps;
from the end of every step but the last, ``rollout.samples`` continuations are drawn with the policy
of ``model.init_from`` and judged by ``label.reward`` (the record's exact answer, if none is named).
A continuation is right where its score is above ``label.threshold`` and it ended. A step's hard
label is 1 if any continuation is right, its soft label is the share of those that are; the last
step of a solution that ended has the solution's own verdict for both. ``label.solutions`` says what
is labelled:

    policy       ``label.draws`` solutions that the policy draws for each problem of ``data``
    data         those in the records of ``data``: ``steps``, or text under completion or solution
    jsonl:PATH   those in the lines of a file, each with the ``prompt`` of a problem of ``data``

``data.max_prompt`` is for prompt and steps together. Written are steps.jsonl and, of problems that
are held out whole, held_out_steps.jsonl: ``prompt``, ``steps``, ``labels`` (hard), ``soft_labels``,
``samples`` (N), ``seed``, ``solution`` (its number). A step has the label null where nothing was
asked: a solution's last one where it was cut off, and prefixes that are too long. A run that was
killed goes on with the last whole part of its work, and ends with the same labels.
"""

import collections
import itertools
import logging
import math
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from rlhf_jax import program, run_folder
from rlhf_jax.continuations import (
    Batch,
    Continuer,
    Lines,
    Prefix,
    Shapes,
    outcomes_of,
    plan_batches,
)
from rlhf_jax.judge import Judge, check_judge, make_judge
from rlhf_jax.label_samples import with_messages, write_lines
from rlhf_jax.ops.step_labels import hard_labels
from rlhf_jax.parts import open_parts, through_parts
from rlhf_jax.policy_sampler import PolicySampler, check_problems
from rlhf_jax.step_solutions import (
    Found,
    Solution,
    check_room,
    drawn_lines,
    fingerprint,
    of_file,
    of_lines,
    of_records,
    read_problems,
)
from rlhf_jax.token_lines import padded
from rlhf_jax.training.keys import Purpose
from rlhf_jax.training.writer import write_json

_log = logging.getLogger("rlhf_jax.label_steps")  # __name__ is "__main__" when it is run
_EXACT = dict(name="exact_match")
_THRESHOLD = 0.5
_EVERY = 16  # batches between two parts
_WIDTHS = 4  # that prefixes are padded to at most; each is a program to compile
_WARM_UP = 2  # batches of a width that may compile

Numbers = dict[str, Any]


def check_config(config: ConfigDict) -> None:
    """Raises a ValueError for what cannot be labelled."""
    label, drawn = config.label, config.label.solutions == "policy"
    if not drawn and label.solutions != "data" and not label.solutions.startswith("jsonl:"):
        raise ValueError(
            f"label.solutions={label.solutions!r}; wanted 'policy', 'data' or 'jsonl:PATH'"
        )
    for key in ("problems", "draws"):
        if drawn and key not in label:
            raise ValueError(f"label.{key} is missing, and label.solutions='policy' draws so many")
    if not drawn and "draws" in label:
        raise ValueError(
            f"label.draws={label.draws} but label.solutions={label.solutions!r} draws none; leave "
            "it out"
        )
    if not 0 <= label.held_out < 1:
        raise ValueError(f"label.held_out={label.held_out}; wanted a share below 1")
    most = max(config.rollout.samples, label.get("draws", 1))
    if most > 1 and config.rollout.sampling.get("temperature", 1.0) == 0:
        raise ValueError(
            f"rollout.sampling.temperature=0 draws the same {most} times; set it above 0, or "
            "rollout.samples and label.draws to 1"
        )
    if not math.isfinite(label.get("threshold", _THRESHOLD)):
        raise ValueError(f"label.threshold={label.threshold}; wanted a finite number")
    check_judge("label.reward", _reward(config))


def _reward(config: ConfigDict) -> ConfigDict:
    return ConfigDict(config.label.get("reward", _EXACT))


def read_solutions(config: ConfigDict, sampler: PolicySampler) -> Found | None:
    """The solutions that are there already; None where the policy is to draw them.

    Raises:
        ValueError: for solutions that cannot be labelled; no device is touched.
    """
    if config.label.solutions == "policy":
        check_problems("label.problems", config.label.problems, sampler)
        check_room(config, sampler)
        return None
    found = (of_records if config.label.solutions == "data" else of_file)(config, sampler)
    long = [one for one in prefixes_of(found) if one.length > config.data.max_prompt]
    if long and config.data.overlong == "error":
        raise ValueError(
            f"solution {long[0].solution.index}, step {long[0].step + 1}: prompt and steps are "
            f"{long[0].length} tokens but data.max_prompt={config.data.max_prompt}; {len(long)} "
            'prefixes are longer; raise it, or set data.overlong to "skip" or "truncate"'
        )
    return found


def prefixes_of(found: Found) -> list[Prefix]:
    """All prefixes that can be continued: every whole step's but that of the last one, where the
    solution ended."""
    return [
        Prefix(one, step)
        for one in found.solutions
        for step in range(one.complete - 1 if one.ended else one.complete)
    ]


def label_steps(config: ConfigDict, workdir: str) -> Numbers:
    """Draws, judges and writes; returns the summary.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    started = time.time()
    check_config(config)
    sampler = PolicySampler(config, Purpose.EVALUATE)
    judge = make_judge("label.reward", _reward(config), sampler)
    found = read_solutions(config, sampler)
    folder = run_folder.prepare(workdir, config, {})
    if found is None:
        problems = read_problems(sampler.prompts, config.label.problems)
        parts = open_parts(folder, fingerprint(problems, sampler.digest()))
        found = draw_solutions(config, sampler, parts)
    else:
        parts = open_parts(folder, fingerprint(found.solutions, sampler.digest()))
    every, limit = prefixes_of(found), config.data.max_prompt
    kept = [one for one in every if one.length <= limit or config.data.overlong == "truncate"]
    long = sum(one.length > limit for one in every)
    continuer = make_continuer(config, sampler, judge, found)
    verdicts = judge_solutions(config, continuer, parts, found.solutions)
    outcomes, numbers = continue_all(config, sampler, continuer, parts, kept)
    rows, dropped = labelled(config, sampler, found, verdicts, outcomes)
    for name, lines in rows.items():
        write_lines(folder / f"{name}.jsonl", lines)
    summary = {f"rows/{name}": len(lines) for name, lines in rows.items()}
    summary |= {f"dropped/{why}": n for why, n in sorted({**found.dropped, **dropped}.items())}
    summary |= {"solutions": len(found.solutions), "prefixes_overlong": long, **numbers}
    ended = [verdicts[one.index] for one in found.solutions if one.ended]
    summary |= {"accuracy": sum(ended) / len(ended)} if ended else {}
    summary["compiles_after_warmup"] = sampler.compiles.after_warmup
    summary |= run_folder.closing_facts(started)
    if jax.process_index() == 0:
        write_json(folder / "summary.json", summary)
        for name, number in numbers.items():
            print(f"{name} {number:.6g}")
    return summary


def draw_solutions(config: ConfigDict, sampler: PolicySampler, parts: pathlib.Path) -> Found:
    """``label.draws`` solutions of each of ``label.problems`` problems."""
    problems, every = config.label.problems, config.label.get("every", _EVERY)

    def work(ready):
        start = ready * every * config.rollout.prompts
        batches = sampler.batches(problems, start=start, samples=config.label.draws)
        found = (drawn_lines(sampler, first, rollouts, problems) for first, rollouts in batches)
        return merged(found, every)

    drawn = through_parts(parts, "solutions", work)
    return of_lines([line for _, lines in drawn for line in lines], sampler)


def make_continuer(
    config: ConfigDict, sampler: PolicySampler, judge: Judge, found: Found
) -> Continuer:
    """What draws and judges, with one shape for all that is judged."""
    shapes = Shapes(
        rows=config.rollout.prompts,
        prompt=padded(max(len(one.problem.prompt) for one in found.solutions)),
        solution=padded(max(len(one.tokens) for one in found.solutions)),
    )
    above = config.label.get("threshold", _THRESHOLD)
    return Continuer(sampler, judge, shapes, seed=config.seed, right_above=above)


def judge_solutions(
    config: ConfigDict, continuer: Continuer, parts: pathlib.Path, solutions: list[Solution]
) -> dict[int, int]:
    """The verdict on each solution itself, by its index."""
    n, every = config.rollout.prompts, config.label.get("every", _EVERY)

    def work(ready):
        firsts = range(ready * every * n, len(solutions), n)
        return merged((continuer.verdicts(solutions[i : i + n]) for i in firsts), every)

    found = through_parts(parts, "verdicts", work)
    return {line["solution"]: line["right"] for _, lines in found for line in lines}


def continue_all(
    config: ConfigDict,
    sampler: PolicySampler,
    continuer: Continuer,
    parts: pathlib.Path,
    prefixes: list[Prefix],
) -> tuple[dict[tuple[int, int], list[int]], Numbers]:
    """The outcomes of every prefix's continuations by solution and step, and what they took."""
    every, samples = config.label.get("every", _EVERY), config.rollout.samples
    batches = plan_batches(
        prefixes,
        rows=config.rollout.prompts,
        limit=config.data.max_prompt,
        most=config.label.get("widths", _WIDTHS),
    )
    widths = collections.Counter(batch.width for batch in batches)
    _log.info(
        "%d prefixes x %d continuations in %d batches; widths and their batches: %s",
        *(len(prefixes), samples, len(batches)),
        ", ".join(f"{width}: {count}" for width, count in widths.items()) or "none",
    )
    tally = Tally(samples)

    def work(ready):
        return merged(warm_by_width(sampler, continuer, batches[ready * every :], tally), every)

    lines: Lines = []
    with tqdm(total=len(prefixes), unit="prefix") as bar:
        for made_now, part in through_parts(parts, "outcomes", work):
            lines += part
            bar.update(len(part))
            tally.before += 0 if made_now else len(part) * samples
    numbers = {
        "prefixes": len(prefixes),
        "continuations": len(prefixes) * samples,
        "continuations_before": tally.before,
        "tokens": sum(line["tokens"] for line in lines),
        "widths": len(widths),
        **tally.rates(),
    }
    return outcomes_of(lines), numbers


def merged(batches: Iterable[Lines], every: int) -> Iterator[Lines]:
    """The lines of so many batches together."""
    batches = iter(batches)
    while some := list(itertools.islice(batches, every)):
        yield [line for lines in some for line in lines]


class Tally:
    """What the batches of this session took: all of them, and those that compiled nothing."""

    def __init__(self, samples: int):
        self.before = 0  # continuations of earlier sessions
        self._samples = samples
        self._totals: collections.Counter[str] = collections.Counter()

    def add(self, lines: Lines, seconds: float, warm: bool) -> None:
        """One batch."""
        tokens, count = sum(line["tokens"] for line in lines), len(lines) * self._samples
        for kind in ("", "warm/") if warm else ("",):
            self._totals[f"{kind}seconds"] += seconds
            self._totals[f"{kind}tokens"] += tokens
            self._totals[f"{kind}continuations"] += count

    def rates(self) -> Numbers:
        """Per second, over what there was; nothing where nothing was drawn."""
        return {
            f"{kind}{what}_per_second": self._totals[f"{kind}{what}"] / seconds
            for kind in ("", "warm/")
            if (seconds := self._totals[f"{kind}seconds"])
            for what in ("continuations", "tokens")
        }


def warm_by_width(
    sampler: PolicySampler, continuer: Continuer, batches: list[Batch], tally: Tally
) -> Iterator[Lines]:
    """The outcomes of each batch; the first two of each width may compile."""
    for _, group in itertools.groupby(batches, key=lambda batch: batch.width):
        begun = time.perf_counter()
        for done, lines in enumerate(continuer.outcomes(sampler.compiles.loop(group))):
            ended = time.perf_counter()
            tally.add(lines, ended - begun, warm=done >= _WARM_UP)
            yield lines
            begun = time.perf_counter()


def labelled(
    config: ConfigDict,
    sampler: PolicySampler,
    found: Found,
    verdicts: Mapping[int, int],
    outcomes: Mapping[tuple[int, int], list[int]],
) -> tuple[dict[str, Lines], dict[str, int]]:
    """Lines by file, and how many solutions have no label at all."""
    asked = list(outcomes)
    right = np.array([outcomes[key] for key in asked], bool)
    right = right.reshape(len(asked), config.rollout.samples)
    hard = dict(zip(asked, np.asarray(hard_labels(right)).tolist(), strict=True))
    soft = dict(zip(asked, right.mean(axis=1).tolist(), strict=True))  # `soft_labels` in float64
    held_out = round(found.problems * config.label.held_out)
    rows: dict[str, Lines] = {"steps": [], "held_out_steps": []}
    dropped: dict[str, int] = {}
    for one in found.solutions:
        both = [
            [by.get((one.index, step)) for step in range(len(one.steps))] for by in (hard, soft)
        ]
        for labels in both:
            if one.ended:
                labels[-1] = float(verdicts[one.index])
        if all(label is None for label in both[0]):
            dropped["unlabelled"] = dropped.get("unlabelled", 0) + 1
            continue
        line = {
            "prompt": sampler.text.decode(one.problem.prompt),
            "steps": one.steps,
            "labels": both[0],
            "soft_labels": both[1],
            "samples": config.rollout.samples,
            "seed": config.seed,
            "solution": one.index,
        }
        name = "held_out_steps" if one.number < held_out else "steps"
        record = sampler.record(one.problem.source, one.problem.record)
        rows[name] += with_messages({name: [line]}, record, config.data.get("chat"))[name]
    return rows, dropped


if __name__ == "__main__":
    program.run_program(label_steps)
