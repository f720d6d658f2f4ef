"""Does the exact-answer reward agree with GSM8K's reference solutions, and refuse wrong ones?

Every solution goes the way of a rollout: encoded by a tokenizer, cut into no more than its own
tokens, decoded and graded by `exact_match` against its record.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rlhf_jax.data.sources import Record
from rlhf_jax.rewards.exact_match import exact_match, parse_answer
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Prompts, Rollouts

MARKER = "####"
BATCH = 512
_LAST = re.compile(r"####.*\Z", re.DOTALL)


def _answer(solution: str) -> str:
    return str(parse_answer(solution, MARKER))


def _with(solution: str, ending: str) -> str:
    return _LAST.sub(lambda _: ending, solution)


def _plus_one(solution: str) -> str:
    return _with(solution, f"{MARKER} {parse_answer(solution, MARKER) + 1}")


# What is done to a solution -> whether it is still right. None: the solution has no such form.
RIGHT: dict[str, Callable[[str], str | None]] = {
    "as it is": lambda s: s,
    "the answer alone": lambda s: f"{MARKER} {_answer(s)}",
    "two decimals": lambda s: _with(s, f"{MARKER} {parse_answer(s, MARKER):.2f}"),
    "a dollar sign": lambda s: _with(s, f"{MARKER} ${_answer(s)}"),
    "a wrong answer before": lambda s: f"{_plus_one(s)}\n{MARKER} {_answer(s)}",
}
WRONG: dict[str, Callable[[str], str | None]] = {
    "the number plus one": _plus_one,
    "another digit": lambda s: _with(s, f"{MARKER} {_answer(s)}1"),
    "the sign turned": lambda s: (
        _with(s, f"{MARKER} {-parse_answer(s, MARKER)}") if parse_answer(s, MARKER) else None
    ),
    "no marker": lambda s: s.replace(MARKER, ""),
    "no number": lambda s: _with(s, MARKER),
    "the number in words": lambda s: _with(s, f"{MARKER} the answer is above"),
    "a wrong answer after": lambda s: f"{s}\n{MARKER} {parse_answer(s, MARKER) + 1}",
    "cut before the answer": lambda s: _with(s, ""),
}


def grade(records: Sequence[Record], completions: Sequence[str], text: Tokenizer) -> list[bool]:
    """Whether `exact_match` calls each completion right, for the record of the same index."""
    reward = exact_match(decode=text.decode, records=lambda source, record: records[record])
    found: list[bool] = []
    for first in range(0, len(completions), BATCH):
        rollouts = _rollouts(completions[first : first + BATCH], first, text)
        scores, _ = reward.score(reward.init(), rollouts)
        found += (np.asarray(scores.outcome) == 1.0).tolist()
    return found


def report(records: Sequence[Record], text: Tokenizer) -> Iterator[tuple[str, bool, int, int]]:
    """(what was done to the solutions, whether they are right then, how many, graded as such)."""
    for forms, right in ((RIGHT, True), (WRONG, False)):
        for name, change in forms.items():
            changed = [change(record["answer"]) for record in records]
            kept = [i for i, solution in enumerate(changed) if solution is not None]
            graded = grade([records[i] for i in kept], [changed[i] for i in kept], text)
            yield name, right, len(kept), sum(one == right for one in graded)


def _rollouts(completions: Sequence[str], first: int, text: Tokenizer) -> Rollouts:
    """One completion each for the prompts of records `first`, `first` + 1, ..."""
    rows = [[*text.encode(one), text.eos_ids[0]] for one in completions]
    count, width = len(rows), max(map(len, rows))
    tokens = np.full((count, width), text.pad_id, np.int32)
    mask = np.arange(width)[None] < np.array([len(row) for row in rows])[:, None]
    tokens[mask] = np.concatenate(rows)
    none = np.zeros(mask.shape, np.float32)
    zeros = np.zeros(count, np.int32)
    return Rollouts(
        prompts=Prompts(
            tokens=np.full((count, 1), text.pad_id, np.int32),
            mask=np.zeros((count, 1), bool),
            record=np.arange(first, first + count, dtype=np.int32),
            source=zeros,
            draw=zeros,
        ),
        tokens=tokens,
        mask=mask,
        step_ends=np.zeros(mask.shape, bool),
        logprobs=none,
        behaviour_logprobs=none,
        truncated=np.zeros(count, bool),
        sample=zeros,
        version=zeros,
    )
