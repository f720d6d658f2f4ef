"""Which of a policy's answers are worth rehearsing: the best of every cluster of answers.

    python -m rlhf_jax.select_rehearsal --config=configs/X.py --workdir=DIR

Selective rehearsal (Peng et al. 2023, https://arxiv.org/abs/2309.10202): answers are embedded,
clustered, and the ``select.keep`` with the highest scores of each of ``select.clusters`` clusters
(none at or below ``select.above``, if it is set) become rehearsal.jsonl, which a policy run reads
as ``extra.rehearsal`` and trains on beside its reward (``algorithm.rehearsal``). So a run that is
paid for one kind of task keeps what the policy could do in the others. The answers are

    the policy's own   ``rollout.samples`` for each of ``select.problems`` prompts of ``data``
    given ones         all under the field ``select.completions`` of the records of ``data``, a text
                       or a list of them, as `rlhf_jax.generate` writes

The one reward of ``rewards``, learned or not, scores them. The embedding is the mean of the final
hidden states of ``model`` over prompt and answer; its direction from the mean of all is what
k-means sees. Answers that ran into ``rollout.max_tokens`` and texts
that came before are left out. Written are rehearsal.jsonl (prompt, completion, score, cluster),
report.md and report.json (of each cluster: how many, kept, scores, its best answer).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from rlhf_jax import program, run_folder
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.judge import Judge
from rlhf_jax.label_samples import with_messages, write_lines
from rlhf_jax.learned_judge import check_learned, make_learned
from rlhf_jax.ops.clusters import best_of_clusters, cluster, directions
from rlhf_jax.policy_sampler import PolicySampler, check_problems
from rlhf_jax.reference_answers import Answers, batches_of, check_field, own_writer
from rlhf_jax.schema import within
from rlhf_jax.training.keys import Purpose
from rlhf_jax.training.writer import write_json, write_text
from rlhf_jax.types import Rollouts

_SHOWN = 60  # characters of a text in the report


class Answer(NamedTuple):
    """One answer, what it is worth, and where it lies."""

    prompt: str
    completion: str
    record: Mapping[str, Any]
    score: float
    embedding: Float[np.ndarray, " D"]


def check_config(config: ConfigDict) -> None:
    """Raises a ValueError for what cannot be selected."""
    given = "completions" in config.select
    if len(config.rewards) != 1:
        raise ValueError(
            f"rewards has {', '.join(config.rewards) or 'nothing'}; wanted one, which scores"
        )
    for label, section in config.rewards.items():
        check_learned(label, section)
    if given and "problems" in config.select:
        raise ValueError(
            f"select.problems={config.select.problems} beside select.completions, whose records "
            "are all read; leave problems out"
        )
    if not given and "problems" not in config.select:
        raise ValueError("select.problems is missing, and the policy draws for so many prompts")


def check_answers(config: ConfigDict, prompts: PromptSource) -> None:
    """Raises a ValueError for records without the answers, or fewer prompts than are drawn for."""
    if "completions" in config.select:
        with within("select.completions"):
            check_field(prompts, config.select.completions)
    else:
        check_problems("select.problems", config.select.problems, prompts)


def select_rehearsal(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Scores, embeds, clusters and writes; returns the summary.

    Raises:
        ValueError: for bad input, before any device is touched; also for fewer different answers
            than clusters, or a score that is no number.
    """
    started = time.time()
    check_config(config)
    (label,) = config.rewards
    sampler = PolicySampler(config, Purpose.EVALUATE)
    check_answers(config, sampler.prompts)
    judge_of = make_learned(label, config)
    folder = run_folder.prepare(workdir, config, {})
    found, counts = distinct(answers(config, sampler, judge_of(sampler)))
    with within("select.clusters"):
        labels = cluster(
            directions(np.stack([one.embedding for one in found])),
            config.select.clusters,
            seed=config.seed,
        )
    with within(f"rewards.{label}"):
        scores = np.array([one.score for one in found])
        above = config.select.get("above", -np.inf)
        kept = best_of_clusters(labels, scores, config.select.keep, above=above)
        if not kept.size:
            raise ValueError(f"no answer has a score above select.above={above}; lower it")
    rows = [row for i in kept for row in line_of(found[i], int(labels[i]), config)]
    write_lines(folder / "rehearsal.jsonl", rows)
    table = clusters_of(found, labels, kept)
    summary = {**counts, "clusters": len(table), "kept": len(kept)}
    summary |= {"score": float(scores.mean()), "score_kept": float(scores[kept].mean())}
    summary["compiles_after_warmup"] = sampler.compiles.after_warmup
    summary |= run_folder.closing_facts(started)
    if jax.process_index() == 0:
        write_json(folder / "report.json", {"clusters": table})
        write_text(folder / "report.md", page(table, summary, label))
        write_json(folder / "summary.json", summary)
        print(f"kept {len(kept)} of {len(found)} answers in {len(table)} clusters")
    return summary


def answers(config: ConfigDict, sampler: PolicySampler, judge: Judge) -> Iterator[Answer | None]:
    """All answers; None in place of one that ran into the token limit."""
    for rollouts, rows in batches(config, sampler):
        scores, embedded = judge(rollouts), sampler.embed(rollouts)
        texts = [one for group in sampler.decode(rollouts) for one in group]
        for i, text in enumerate(texts[:rows]):
            if not text.ended:
                yield None
                continue
            yield Answer(text.prompt, text.completion, text.record, float(scores[i]), embedded[i])


def batches(config: ConfigDict, sampler: PolicySampler) -> Iterator[tuple[Rollouts, int]]:
    """Rollouts, drawn or given, and how many of their rows count."""
    if "completions" not in config.select:
        problems, k = config.select.problems, config.rollout.samples
        for first, rollouts in sampler.batches(problems):
            yield rollouts, (problems - first) * k
        return
    written = Answers(
        field=config.select.completions,
        prompts=sampler.prompts,
        writer=own_writer(config, sampler.text, sampler.tables),
        rows=config.rollout.prompts * config.rollout.samples,
    )
    for rollouts, rows in batches_of(written):
        yield sampler.place(rollouts), rows


def distinct(found: Iterator[Answer | None]) -> tuple[list[Answer], dict[str, int]]:
    """The answers that ended, each text once, and what was left out.

    Raises:
        ValueError: none is left.
    """
    every = list(found)
    ended = [one for one in every if one is not None]
    unique = list({(one.prompt, one.completion): one for one in reversed(ended)}.values())[::-1]
    if not unique:
        raise ValueError(
            f"all {len(every)} answers ran into the limit of rollout.max_tokens; raise it"
        )
    counts = {
        "answers": len(every),
        "answers_truncated": len(every) - len(ended),
        "answers_repeated": len(ended) - len(unique),
    }
    return unique, counts


def line_of(one: Answer, label: int, config: ConfigDict) -> list[dict[str, Any]]:
    """The line of rehearsal.jsonl."""
    line = {
        "prompt": one.prompt,
        "completion": one.completion,
        "score": one.score,
        "cluster": label,
    }
    return with_messages({"": [line]}, one.record, config.data.get("chat"))[""]


def clusters_of(
    found: Sequence[Answer], labels: Int[np.ndarray, " M"], kept: Int[np.ndarray, " R"]
) -> list[dict[str, Any]]:
    """What is in each cluster, the largest first."""
    table = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        chosen = kept[labels[kept] == label]
        scores = np.array([one.score for one in found])
        best = found[chosen[np.argmax(scores[chosen])]] if chosen.size else None
        table.append(
            {
                "cluster": label,
                "answers": len(members),
                "kept": len(chosen),
                "score": float(scores[members].mean()),
                "score_kept": float(scores[chosen].mean()) if best else None,
                "best": {"prompt": best.prompt, "completion": best.completion} if best else None,
            }
        )
    return table


def page(table: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], label: str) -> str:
    """report.md."""
    head = (
        f"# Rehearsal\n\n{summary['kept']} of {summary['answers']} answers are kept, those that "
        f"`{label}` scores highest in each of {summary['clusters']} clusters. "
        f"{summary['answers_truncated']} ran into the token limit and "
        f"{summary['answers_repeated']} were there before.\n\n"
        "| cluster | answers | kept | score | score of those kept | best prompt | best answer |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(map(_row, table))


def _row(one: Mapping[str, Any]) -> str:
    """A cluster's line of the table."""
    best = one["best"] or {"prompt": "", "completion": ""}
    score = "" if one["best"] is None else f"{one['score_kept']:.3g}"
    cells = (one["cluster"], one["answers"], one["kept"], f"{one['score']:.3g}", score)
    texts = (_shown(best["prompt"]), _shown(best["completion"]))
    return "| " + " | ".join(map(str, (*cells, *texts))) + " |\n"


def _shown(text: str) -> str:
    """The beginning of a text in a cell of a table."""
    flat = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return f"`{flat[:_SHOWN]}`" if flat else ""


if __name__ == "__main__":
    program.run_program(select_rehearsal)
