"""Published sets of solutions with step labels, read into one plain form; see `reward_sets`.

First wrong steps are counted from 0 here, and -1 says that no step is wrong; files count from 0 or
from 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.examples import pick
from rlhf_jax.data.plain_forms import NO_ERROR, Prompt, Reader, Solution
from rlhf_jax.data.reward_sets import PAIRS, SAMPLES
from rlhf_jax.data.sources import Record


def solutions(record: Record) -> list[Solution]:
    """``prompt`` (or ``question``, ``problem``), ``steps``, and ``labels``: 1, 0 or None each."""
    steps = _steps(record, "steps")
    labels = record.get("labels")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise ValueError(f"labels={labels!r}; wanted one number or None for {len(steps)} steps")
    for label in labels:
        if label is not None and label not in (0, 1):
            raise ValueError(f"labels hold {label!r}; wanted 1, 0 or None")
    given = [None if label is None else float(label) for label in labels]
    return [_labelled(_question(record), steps, given)]


def processbench(record: Record) -> list[Solution]:
    """ProcessBench (Zheng et al. 2024, https://arxiv.org/abs/2412.06559): -1, or the wrong step."""
    generator = record.get("generator")
    categories = {"generator": generator} if generator else {}
    if isinstance(record.get("id"), str) and "-" in record["id"]:
        categories["source"] = record["id"].rpartition("-")[0]
    steps = _steps(record, "steps")
    return [_first(_question(record), steps, _index(record, "label", len(steps)), categories)]


def prmbench(record: Record) -> list[Solution]:
    """PRMBench (Song et al. 2025, https://arxiv.org/abs/2501.03124): wrong steps, from 1 on.

    The published file has ``modified_question`` and ``modified_process``; one that was cut down to
    ``question`` and ``steps`` is read too.
    """
    name = "modified_process" if "modified_process" in record else "steps"
    steps = _steps(record, name)
    wrong = record.get("error_steps")
    if not isinstance(wrong, list) or any(w not in range(1, len(steps) + 1) for w in wrong):
        raise ValueError(f"error_steps={wrong!r}; wanted numbers from 1 to {len(steps)}")
    kind = record.get("classification")
    question = pick(record, ("modified_question", "question"))
    labels = [0.0 if i + 1 in wrong else 1.0 for i in range(len(steps))]
    return [_labelled(question, steps, labels, {"classification": kind} if kind else {})]


def bigbench_mistake(record: Record) -> list[Solution]:
    """BIG-Bench Mistake (Tyen et al. 2023, https://arxiv.org/abs/2311.08516): 0-based, or null."""
    steps = _steps(record, "steps")
    first = NO_ERROR
    if record.get("mistake_index") is not None:
        first = _index(record, "mistake_index", len(steps))
    task = {"task": record["task"]} if record.get("task") else {}
    return [_first(pick(record, ("input",)), steps, first, task)]


def mr_ben(record: Record) -> list[Solution]:
    """MR-Ben (Zeng et al. 2024, https://arxiv.org/abs/2406.13975): 1-based, or N/A.

    Solutions of its coding part are one text without steps: they give nothing, and so do records
    that name no step.
    """
    if isinstance(record.get("Model_Solution_Steps"), str):
        return []
    steps = _steps(record, "Model_Solution_Steps")
    said = str(record.get("Model_Solution_First_Error_Step", "")).strip()
    subject = record.get("Subject")
    options = record.get("Options")
    question = pick(record, ("Question",)) + (f"\n{options}" if options else "")
    first = NO_ERROR
    if pick(record, ("Model_Solution_Correctness",)) != "correct":
        if not said.isdecimal() or not 1 <= int(said) <= len(steps):
            return []
        first = int(said) - 1
    return [_first(question, steps, first, {"subject": subject} if subject else {})]


SOLUTIONS: Mapping[str, Reader] = {
    "solutions": solutions,
    "prm800k": solutions,
    "processbench": processbench,
    "prmbench": prmbench,
    "bigbench_mistake": bigbench_mistake,
    "mr_ben": mr_ben,
}
KINDS: Mapping[str, Mapping[str, Reader]] = {
    "pairs": PAIRS,
    "samples": SAMPLES,
    "solutions": SOLUTIONS,
}


def find_form(form: str) -> tuple[str, Reader]:
    """The kind of a form, "pairs", "samples" or "solutions", and its reader.

    Raises:
        ValueError: a form that is not known.
    """
    for kind, readers in KINDS.items():
        if form in readers:
            return kind, readers[form]
    known = "; ".join(f"{kind}: {', '.join(readers)}" for kind, readers in KINDS.items())
    raise ValueError(f"form={form!r}; known {known}")


def _first(
    prompt: Prompt, steps: Sequence[str], first: int, categories: Mapping[str, str]
) -> Solution:
    """Steps before the first wrong one are right, behind it nobody knows."""
    until = len(steps) if first == NO_ERROR else first
    labels: list[float | None] = [1.0] * until
    if first != NO_ERROR:
        labels += [0.0] + [None] * (len(steps) - until - 1)
    return Solution(prompt, steps, labels, first, categories)


def _labelled(
    prompt: Prompt,
    steps: Sequence[str],
    labels: Sequence[float | None],
    categories: Mapping[str, str] = {},
) -> Solution:
    wrong = [i for i, label in enumerate(labels) if label == 0]
    return Solution(prompt, steps, labels, wrong[0] if wrong else NO_ERROR, categories)


def _question(record: Record) -> str:
    return pick(record, ("prompt", "question", "problem"))


def _steps(record: Record, name: str) -> list[str]:
    steps: Any = record.get(name)
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise ValueError(f"field {name!r} holds {type(steps).__name__}; wanted a list of texts")
    return steps


def _index(record: Record, name: str, count: int) -> int:
    """The first wrong step under a field, from -1 to the last."""
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value < count:
        raise ValueError(f"{name}={value!r}; wanted -1, or a step from 0 to {count - 1}")
    return value
