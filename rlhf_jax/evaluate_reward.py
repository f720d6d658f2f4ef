"""Measures a reward model on any number of published sets and writes a report.

    python -m rlhf_jax.evaluate_reward --config=configs/eval_reward.py --workdir=DIR

The model is a run's folder or a Hugging Face folder with an outcome or a process head. A section of
``reward_sets`` names the form of a set and its file: pairs (RewardBench, PPE, RM-Bench, JudgeBench,
LLMBar, ...), prompts with samples that are right or wrong (RewardBench 2, PPE, ...) or solutions
with step labels (ProcessBench, PRMBench, ...); see `rlhf_jax.data.reward_sets` and `process_sets`.
Texts are scored as in training, by `models.completions.evaluate_texts` at the last token and where
steps end. Written are

    report.md     tables: every accuracy beside length and majority baselines, intervals are 95 %
    report.json   the same numbers, all categories and curves, and what was left out and why
    scores.jsonl  one line for each pair, prompt or solution

``python -m rlhf_jax.evaluate`` with such a config does the same.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from rlhf_jax import averages, build, model_folder, program, reward_numbers, run_folder
from rlhf_jax.compile_watch import CompileWatch
from rlhf_jax.data.examples import Row
from rlhf_jax.data.plain_forms import NO_ERROR
from rlhf_jax.data.process_sets import find_form
from rlhf_jax.label_samples import write_lines
from rlhf_jax.mesh import batch_shards
from rlhf_jax.model_folder import ModelFolder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.passes import longest_row
from rlhf_jax.ops.process_metrics import aggregate_logit, best_threshold, first_wrong
from rlhf_jax.ops.step_labels import check_how
from rlhf_jax.reward_numbers import Findings
from rlhf_jax.reward_page import page
from rlhf_jax.reward_set_rows import RewardSet, read_set, step_lines
from rlhf_jax.schema import closest, is_ours, within
from rlhf_jax.score import make_reader, needs_prompt, readings_of, score_name
from rlhf_jax.token_lines import Line, batch_rows, padded
from rlhf_jax.training.writer import write_json, write_text

_log = logging.getLogger("rlhf_jax.evaluate_reward")
Said = Mapping[str, Any]  # what `score` writes of one text
# What `model_folder` calls flags are keys of the config here.
_KEYS = {"--model": "reward.init_from", "--tokenizer": "data.tokenizer", "--dtype": "reward.dtype"}


class Heads(NamedTuple):
    """Under which names a model's numbers of texts and of steps come; "" where it has none."""

    score: str
    step_scores: str


class Scored(NamedTuple):
    """A set with its scores, entry by entry.

    `scores` and `lengths` (tokens of the completion) have one number for each row; `steps` one
    logit for each step of a solution. A model without the head has None.
    """

    found: RewardSet
    scores: list[Float[np.ndarray, " _"]] | None
    lengths: list[np.ndarray]
    steps: list[Float[np.ndarray, " _"]] | None


def check_config(config: ConfigDict) -> None:
    """Raises a ValueError for what cannot be measured; opens nothing."""
    if not config.reward_sets:
        raise ValueError("reward_sets is empty; name a set by form and name")
    if not config.reward.init_from:
        raise ValueError("reward.init_from is empty; wanted the folder of a reward model")
    kinds = {}
    for label, section in config.reward_sets.items():
        with within(f"reward_sets.{label}"):
            kinds[label], _ = find_form(section.form)
    with within("reward.aggregate"):
        check_how(config.reward.get("aggregate", "min"))
    threshold = config.reward.get("threshold", 0.5)
    if not 0 < threshold < 1:
        raise ValueError(f"reward.threshold={threshold}; wanted a probability between 0 and 1")
    label = config.reward.get("threshold_from", "")
    if label and kinds.get(label) != "solutions":
        process = [name for name, kind in kinds.items() if kind == "solutions"]
        raise ValueError(
            f"reward.threshold_from={label!r}{closest(label, process)}; wanted a set of solutions: "
            f"{', '.join(process) or 'there is none'}"
        )


def open_model(config: ConfigDict) -> ModelFolder:
    """Looks at the model's folder; touches no device."""
    with _as_keys():
        opened = model_folder.open_model(
            config.reward.init_from,
            tokenizer=config.data.get("tokenizer", ""),
            chat_template=config.data.get("chat_template") or "",
            bos=config.data.get("bos"),
            dtype=config.reward.get("dtype", ""),
        )
    averages.check("reward", config.reward)
    # Nothing reads log-probabilities here, and they would cost a pass over the vocabulary.
    alone = dataclasses.replace(opened.config, lm_head=False)
    return opened._replace(config=alone, others=tuple(config.reward.get("average", ())))


@contextlib.contextmanager
def _as_keys() -> Iterator[None]:
    """Says keys of the config where `model_folder` names flags."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        if not is_ours(error):
            raise
        for flag, key in _KEYS.items():
            said = said.replace(flag, key)
        raise ValueError(said) from error


def heads_of(config: ModelConfig, head: str = "") -> Heads:
    """The names of the numbers to read: of the head that is named, else of the model's own.

    Raises:
        ValueError: the model has no such head, or none that judges.
    """
    readings = readings_of(config)
    named = [one for one in readings if one.head == head] if head else readings
    if not named:
        known = ", ".join(one.head for one in readings) or "none"
        raise ValueError(
            f"reward.head={head!r}; the model's heads are {known}"
            if head
            else "reward.init_from: the model has no outcome or process head; its heads are "
            f"{', '.join(config.score_heads) or 'none, and implicit rewards are not read here'}"
        )
    first = [one.score for one in named if one.score], [one.step_scores for one in named]
    steps = [name for name in first[1] if name]
    return Heads(first[0][0] if first[0] else "", steps[0] if steps else "")


def open_sets(config: ConfigDict, opened: ModelFolder) -> dict[str, RewardSet]:
    """Reads and encodes all sets; touches no device."""
    sets = {
        label: read_set(label, section, config.data, opened.text, asked=needs_prompt(opened.config))
        for label, section in config.reward_sets.items()
    }
    if opened.config.max_positions and config.data.max_length > opened.config.max_positions:
        raise ValueError(
            f"data.max_length={config.data.max_length}, but the model has "
            f"{opened.config.max_positions} learned positions"
        )
    label = config.reward.get("threshold_from", "")
    if label:
        firsts = {entry.item.first_wrong == NO_ERROR for entry in sets[label].entries}
        if len(firsts) < 2:
            which = "right" if firsts == {True} else "wrong"
            raise ValueError(
                f"reward.threshold_from={label!r}: all of its solutions are {which}, which gives "
                "no threshold; name a set that has both"
            )
    for one in sets.values():
        left_out = {name: n for name, n in one.counts.items() if n and name != "records"}
        _log.info("%s: %d records, %s", one.label, one.counts["records"], left_out)
    return sets


def score_rows(
    rows: Sequence[Row],
    read: Callable[[list[Line], int], list[Said]],
    batch: int,
    watch: CompileWatch,
    *,
    widest: float | int = math.inf,
) -> list[Said]:
    """What a model says of rows, in their order; equal rows are scored once.

    Args:
        read: gets `batch` lines of one padded width.
        widest: to how many tokens rows are padded at most.
        watch: counts what is compiled once each width is warm.
    """
    keys = [(row.prompt, *row.tokens) for row in rows]
    unique = dict(zip(keys, rows, strict=True))
    by_width: dict[int, list[tuple]] = {}
    for key, row in unique.items():
        width = int(min(padded(len(row.tokens)), widest))
        by_width.setdefault(width, []).append(key)
    said: dict[tuple, Said] = {}
    for width, members in sorted(by_width.items(), reverse=True):  # too little memory shows at once
        parts = [members[i : i + batch] for i in range(0, len(members), batch)]
        for part in watch.loop(parts):
            lines = [Line(i, {}, unique[key]) for i, key in enumerate(part)]
            lines += lines[-1:] * (batch - len(lines))
            said |= dict(zip(part, read(lines, width), strict=False))
    return [said[key] for key in keys]


def read_scores(found: RewardSet, said: Sequence[Said], heads: Heads, how: str) -> Scored:
    """The numbers of a set's rows, put together by entry.

    A model without outcome head scores a text by its steps, aggregated as `how` says, as a logit.
    Solutions whose tokens mark other steps than the set has are left out and counted.

    Raises:
        ValueError: a score is no finite number, or no solution is left.
    """
    given = iter(said)
    entries, scores, lengths, steps = [], [], [], []
    solutions, unread = found.kind == "solutions", 0
    for entry in found.entries:
        own = [next(given) for _ in entry.rows]
        if solutions and heads.step_scores:
            lines = own[0][heads.step_scores]
            ends = step_lines(entry.item)
            if len(lines) != ends[-1] + 1:
                unread += 1
                continue
            steps.append(np.asarray(lines, np.float64)[ends])
        entries.append(entry)
        lengths.append(np.array([len(one["tokens"]) for one in own]))
        if heads.score:
            scores.append(np.array([one[heads.score] for one in own], np.float64))
        elif not solutions:
            scores.append(
                np.array([aggregate_logit(one[heads.step_scores], how=how) for one in own])
            )
    for kind in filter(None, (scores, steps)):
        for entry, numbers in zip(entries, kind, strict=True):
            if not np.isfinite(numbers).all():
                raise ValueError(
                    f"reward_sets.{found.label}, record {entry.record}: a score of the model is "
                    "not finite"
                )
    if not entries:
        raise ValueError(
            f"reward_sets.{found.label}: the tokens of no solution mark the steps that the set "
            "has; a token holds several lines, or the chat template writes lines of its own"
        )
    kept = found._replace(
        entries=entries,
        counts=found.counts | {"unreadable_steps": unread, "used": len(entries)},
    )
    return Scored(kept, scores or None, lengths, steps or None)


def measure(one: Scored, *, threshold: float, resamples: int, seed: int) -> Findings:
    """All numbers of a set.

    Args:
        threshold: logits of steps that are not above it call the step wrong.
    """
    items = [entry.item for entry in one.found.entries]
    groups, drawn = one.found.groups, dict(resamples=resamples, seed=seed)
    if one.found.kind == "pairs":
        scores, lengths = np.stack(one.scores), np.stack(one.lengths)
        return reward_numbers.pair_findings(items, scores, lengths, groups, **drawn)
    if one.found.kind == "samples":
        return reward_numbers.sample_findings(items, one.scores, one.lengths, groups, **drawn)
    return reward_numbers.solution_findings(
        items,
        one.steps,
        None if one.scores is None else np.concatenate(one.scores),
        np.concatenate(one.lengths),
        groups,
        threshold=threshold,
        **drawn,
    )


def choose_threshold(config: ConfigDict, scored: Mapping[str, Scored]) -> float:
    """The logit that steps must be above: of ``reward.threshold``, or the best of one set."""
    label = config.reward.get("threshold_from", "")
    if not label or scored[label].steps is None:
        p = config.reward.get("threshold", 0.5)
        return math.log(p) - math.log1p(-p)
    with within(f"reward.threshold_from={label!r}"):
        wanted = np.array([entry.item.first_wrong for entry in scored[label].found.entries])
        return best_threshold(scored[label].steps, wanted)[0]


def lines_of(one: Scored, threshold: float) -> Iterator[dict[str, Any]]:
    """The lines of scores.jsonl of one set."""
    for place, entry in enumerate(one.found.entries):
        line = {
            "set": one.found.label,
            "record": entry.record,
            "categories": dict(entry.item.categories),
            "lengths": one.lengths[place].tolist(),
        }
        if one.scores is not None:
            line["scores"] = one.scores[place].tolist()
        if one.found.kind == "pairs":
            line |= {"tie": entry.item.tie, "models": entry.item.models}
        elif one.found.kind == "samples":
            line["correct"] = [bool(bit) for bit in entry.item.correct]
        else:
            line |= {"labels": list(entry.item.labels), "first_wrong": entry.item.first_wrong}
            if one.steps is not None:
                line["step_scores"] = one.steps[place].tolist()
                line["said_first_wrong"] = first_wrong(one.steps[place], threshold=threshold)
        yield line


def evaluate_reward(config: ConfigDict, workdir: str) -> dict[str, float | int]:
    """Measures the model of ``config.reward`` on ``config.reward_sets``; returns the numbers.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    started = time.time()
    check_config(config)
    opened = open_model(config)
    heads = heads_of(opened.config, config.reward.get("head", ""))
    sets = open_sets(config, opened)
    folder = run_folder.prepare(workdir, config, {})
    mesh, rules = build.mesh(config)
    how, watch, scored = config.reward.get("aggregate", "min"), CompileWatch(), {}
    with jax.set_mesh(mesh):
        read = make_reader(opened, mesh, rules)
        for label, one in sets.items():
            rows = [row for entry in one.entries for row in entry.rows]
            batch = batch_rows(config.data.rows, len(rows), batch_shards(mesh, rules))
            said = score_rows(rows, read, batch, watch, widest=longest_row(opened.config))
            scored[label] = read_scores(one, said, heads, how)
            _log.info("%s: scored %d texts", label, len(rows))
    threshold = choose_threshold(config, scored)
    write_lines(
        folder / "scores.jsonl",
        (line for one in scored.values() for line in lines_of(one, threshold)),
    )
    drawn = dict(resamples=config.get("resamples", 300), seed=config.seed)
    findings = {label: measure(one, threshold=threshold, **drawn) for label, one in scored.items()}
    numbers = reward_numbers.flat(findings) | {"compiles_after_warmup": watch.after_warmup}
    if jax.process_index() == 0:
        report = _report(config, opened, heads, threshold, scored, findings)
        write_json(folder / "report.json", report)
        text = page(report)
        write_text(folder / "report.md", text)
        print(text)
        write_json(folder / "summary.json", numbers | run_folder.closing_facts(started))
    return numbers


def _report(config, opened, heads: Heads, threshold, scored, findings) -> dict[str, Any]:
    """What stands in report.json."""
    names = ("template", "chat", "max_length", "overlong", "end_of_text")
    how, sets = config.reward.get("aggregate", "min"), {}
    for label, one in scored.items():
        found = findings[label]
        sets[label] = {
            "form": one.found.form,
            "kind": one.found.kind,
            "source": config.reward_sets[label].name,
            "counts": one.found.counts,
            "numbers": {name: _spread(value) for name, value in found.numbers.items()},
            "categories": {
                kind: {
                    name: _spread(category.value) | {"count": category.count}
                    for name, category in named.items()
                }
                for kind, named in found.categories.items()
            },
            "sizes": found.sizes,
            "curves": found.curves,
        }
    return {
        "model": " + ".join((opened.path, *opened.others)),
        "tokenizer": opened.text.name,
        "heads": {"texts": score_name(opened.config, heads.score) or f"steps, {how}"}
        | ({"steps": heads.step_scores} if heads.step_scores else {}),
        "threshold": float(np.exp(-np.logaddexp(0.0, -threshold))),
        "threshold_from": config.reward.get("threshold_from", ""),
        "texts": {name: config.data.get(name) for name in names},
        "sets": sets,
    }


def _spread(estimate: reward_numbers.Estimate) -> dict[str, float | int | None]:
    """The parts of a number; null where there is none."""
    return {
        name: None if value is None or math.isnan(value) else value
        for name, value in estimate._asdict().items()
    }


if __name__ == "__main__":
    program.run_program(evaluate_reward)
