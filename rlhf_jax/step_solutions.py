"""Solutions whose steps are to be labelled: from records, from a file, or drawn by the policy.

A solution is kept as tokens, and cut where `mark_step_ends` marks the ends of its steps: a prefix
holds the line break behind its last step, as the policy itself would have written it.
"""

import collections
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data.examples import flag, pick
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.data.sources import Record, open_source, place
from rlhf_jax.data.steps import check_joined
from rlhf_jax.mesh import fetch_host
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.schema import within
from rlhf_jax.text.steps import BLANK, mark_host_step_ends, split_steps
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Rollouts, TokenTables

TEXTS = ("completion", "solution")  # where a record without a list of steps holds its solution
_CHUNK = 1024  # problems that are read at a time


class Problem(NamedTuple):
    """One problem of the data: where its record stands, and the tokens of its prompt."""

    source: int
    record: int
    prompt: list[int]


class Solution(NamedTuple):
    """One solution. ``index`` decides the noise of its continuations, and nothing else does."""

    index: int
    number: int  # of its problem, from 0
    problem: Problem
    tokens: list[int]  # with the end-of-text token, if it ended
    ended: bool
    steps: list[str]
    ends: list[int]  # how many tokens stand before the end of each step, its last one included

    @property
    def complete(self) -> int:
        """Its steps that are whole: all, or all but the one in which it was cut off."""
        return len(self.steps) if self.ended else len(self.steps) - 1


class Found(NamedTuple):
    """Solutions, how many problems they are of, and how many were left out, by reason."""

    solutions: list[Solution]
    problems: int
    dropped: Mapping[str, int]


def read_problems(prompts: PromptSource, count: int) -> Iterator[Problem]:
    """The first ``count`` problems in the order in which they are drawn."""
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        rows = prompts.batch(first, slice(0, size), size)
        for i in range(size):
            tokens = rows.tokens[i][rows.mask[i]].tolist()
            yield Problem(int(rows.source[i]), int(rows.record[i]), tokens)


def cut(
    tokens: Sequence[int], text: str, listed: Sequence[str] | None, tables: TokenTables
) -> tuple[list[str], list[int]]:
    """The steps of a solution and where each ends in its tokens; no steps where they are unclear.

    Args:
        text: of the tokens.
        listed: the steps as they were given, of one or more lines each; None cuts at every line.
    """
    steps = split_steps(text) if listed is None else list(listed)
    row = np.asarray(tokens, np.int32)[None]
    marked = np.flatnonzero(mark_host_step_ends(row, np.ones(row.shape, bool), tables)[0]) + 1
    lines = np.cumsum([len(split_steps(step)) for step in steps])
    if lines[-1] != len(marked):  # a token holds parts of two lines, and ends only one
        return [], []
    return steps, [int(marked[line - 1]) for line in lines]


def read_solution(
    record: Record, text: Tokenizer, tables: TokenTables
) -> tuple[list[int], bool, list[str], list[int]]:
    """Tokens, whether they ended, steps and their ends of the solution in a record.

    Steps are the list under ``steps``, or the lines of the text under `TEXTS`; blank ones are left
    out. ``truncated`` says that the solution was cut off. There are no tokens where nothing is
    visible, and no steps where tokens do not tell them apart.

    Raises:
        ValueError: no such field, or it holds something else.
    """
    listed = record.get("steps")
    if listed is not None:
        wrong = not isinstance(listed, list | tuple) or not all(isinstance(s, str) for s in listed)
        if wrong:
            raise ValueError(f"steps hold {listed!r:.60}; wanted a list of texts, one per step")
        listed = [step for step in listed if step.strip(BLANK)]
        written = "\n".join(listed)
        if TEXTS[0] in record:
            check_joined(written, pick(record, TEXTS[:1]), "steps", TEXTS[0])
    else:
        written = pick(record, TEXTS)
    if not written.strip(BLANK):
        return [], False, [], []
    ended = not flag(record, "truncated")
    tokens = [*text.encode(written), *([text.eos_ids[0]] if ended else [])]
    return tokens, ended, *cut(tokens, written, listed, tables)


class _Collected:
    """Solutions as they come, with numbers for their problems and reasons for those left out."""

    def __init__(self, limit: int | None):
        self.solutions: list[Solution] = []
        self.dropped: collections.Counter[str] = collections.Counter()
        self._numbers: dict[tuple[int, ...], int] = {}
        self._limit = limit

    def add(self, index: int, problem: Problem, tokens, ended: bool, steps, ends) -> None:
        """Problems are told apart by their prompts; those behind the limit are passed over."""
        prompt = tuple(problem.prompt)
        if prompt not in self._numbers and len(self._numbers) == self._limit:
            return
        number = self._numbers.setdefault(prompt, len(self._numbers))
        if not tokens:
            self.dropped["empty"] += 1
        elif not steps:
            self.dropped["unclear_steps"] += 1
        else:
            one = Solution(index, number, problem, list(tokens), ended, list(steps), list(ends))
            self.solutions.append(one)

    def found(self, where: str) -> Found:
        """All of them.

        Raises:
            ValueError: none is left, or there are fewer problems than wanted.
        """
        if not self.solutions:
            reasons = ", ".join(f"{n} {why}" for why, n in self.dropped.items()) or "none there"
            raise ValueError(f"{where}: no solution is left to label ({reasons})")
        if self._limit is not None and len(self._numbers) < self._limit:
            raise ValueError(
                f"label.problems={self._limit} but {where} has solutions of {len(self._numbers)}"
            )
        return Found(self.solutions, len(self._numbers), dict(sorted(self.dropped.items())))


def of_records(config: ConfigDict, sampler: PolicySampler) -> Found:
    """The solutions that stand in the records of ``data`` themselves."""
    collected = _Collected(config.label.get("problems"))
    for index, problem in enumerate(read_problems(sampler.prompts, len(sampler.prompts))):
        where = sampler.prompts.place(problem.source, problem.record)
        with within(where):
            record = sampler.record(problem.source, problem.record)
            read = read_solution(record, sampler.text, sampler.tables)
        collected.add(index, problem, *read)
    return collected.found("data")


def of_file(config: ConfigDict, sampler: PolicySampler) -> Found:
    """The solutions in the lines of a file, of the problems of ``data`` with the same prompts.

    Raises:
        ValueError: naming the line, where its prompt is none of ``data``; under overlong="skip"
            such lines are counted.
    """
    name = config.label.solutions
    with within("label.solutions"):
        lines = open_source(name)
    problems = {
        sampler.text.decode(problem.prompt): problem
        for problem in read_problems(sampler.prompts, len(sampler.prompts))
    }
    collected = _Collected(config.label.get("problems"))
    for index in range(len(lines)):
        record = lines[index]
        with within(place(lines, index)):
            prompt = pick(record, ("prompt",))
            known = problems.get(prompt)
            if known is None and config.data.overlong != "skip":
                raise ValueError(
                    f"prompt {prompt!r:.60} is not among the {len(problems)} of data; label them "
                    'with the data they were made from, or set label.solutions="data"'
                )
            if known is None:
                collected.dropped["unknown_prompt"] += 1
                continue
            read = read_solution(record, sampler.text, sampler.tables)
        collected.add(index, known, *read)
    return collected.found(name)


def drawn_lines(
    sampler: PolicySampler, first: int, rollouts: Rollouts, problems: int
) -> list[dict[str, Any]]:
    """What is kept of a batch of solutions that the policy drew; see `of_lines`."""
    host = fetch_host(rollouts)
    k, lines = host.group_size, []
    for b in range(min(len(host.tokens), (problems - first) * k)):
        row = b // k
        lines.append(
            {
                "index": first * k + b,
                "problem": [
                    int(host.prompts.source[row]),
                    int(host.prompts.record[row]),
                    host.prompts.tokens[row][host.prompts.mask[row]].tolist(),
                ],
                "tokens": host.tokens[b][host.mask[b]].tolist(),
                "ended": not bool(host.truncated[b]),
            }
        )
    return lines


def of_lines(lines: Sequence[Mapping[str, Any]], sampler: PolicySampler) -> Found:
    """The solutions that the policy drew."""
    collected = _Collected(None)
    for line in lines:
        tokens, text = line["tokens"], sampler.text.decode(line["tokens"])
        visible = bool(text.strip(BLANK))
        steps, ends = cut(tokens, text, None, sampler.tables) if visible else ([], [])
        collected.add(
            line["index"], Problem(*line["problem"]), tokens if visible else [], line["ended"],
            steps, ends,
        )  # fmt: skip
    return collected.found("the policy")


def fingerprint(content: Iterable[Problem | Solution], weights: str) -> str:
    """A digest of what labels are made from, beside the config.

    Args:
        weights: a digest of the policy's.
    """
    digest = hashlib.sha256(weights.encode())
    for one in content:
        digest.update(json.dumps(one).encode())
    return digest.hexdigest()


def check_room(config: ConfigDict, sampler: PolicySampler) -> None:
    """Raises a ValueError where the policy may draw a solution whose prefix is overlong.

    Under "skip" and "truncate" such prefixes are left out or cut when they come.
    """
    limit, count = config.data.max_prompt, config.label.problems
    if config.data.overlong != "error":
        return
    longest = max(len(one.prompt) for one in read_problems(sampler.prompts, count))
    if longest + config.rollout.max_tokens > limit:
        raise ValueError(
            f"data.max_prompt={limit} is for prompt and steps together, which may be "
            f"{longest} + rollout.max_tokens={config.rollout.max_tokens} tokens; raise "
            'data.max_prompt, or set data.overlong to "skip" or "truncate"'
        )
