r"""Programs by their tests: a completion's code runs with the record's tests in a sandbox.

The record's fields decide the form, as published sets have them:

- ``test`` and ``entry_point``, with ``prompt``: HumanEval (Chen et al., 2021,
  https://arxiv.org/abs/2107.03374). The completion goes on where the prompt ends, or is a whole
  function; ``check(entry_point)`` is one check.
- ``test_list``, with ``test_setup_code`` and ``challenge_test_list`` if there: MBPP (Austin et
  al., 2021, https://arxiv.org/abs/2108.07732). Each assert is a check.
- ``tests``, a list of ``{"input": ..., "output": ...}``: programs that read stdin and write
  stdout. Outputs are compared line by line, without spaces at ends of lines and of the text.

Code of a model is code of a stranger: see `code_sandbox` for what the limits hold and what not.
Checks of the first two forms run in one process with the code, which can cheat on them; outputs of
the third are compared out of its reach. The reward is off until a config says ``allow=True``.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_jax.rewards.base import Decode, Records, host_reward
from rlhf_jax.rewards.code_sandbox import ISOLATIONS, Job, Limits, namespaces_work, run
from rlhf_jax.types import Reward

SCORES = ("all", "share")
LONGEST = 100_000  # characters of code

_FENCE = re.compile(r"^[ \t]*```[ \t]*([A-Za-z0-9_+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_PYTHON = ("python", "python3", "py")


class Tests(NamedTuple):
    """What a record asks of code: checks after it, or runs of it as (stdin, stdout)."""

    prompt: str = ""  # what stands before a completion that goes on with it
    entry: str = ""  # the function's name, if the record says it
    setup: str = ""  # what the checks need besides the code; it runs after the code
    checks: tuple[str, ...] = ()
    runs: tuple[tuple[str, str], ...] = ()


def code_of(text: str) -> str:
    """The code in `text`: its fenced Python blocks as one, else its first block, else all of it.

    A block that is not closed goes to the end.

    >>> code_of("So:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = _FENCE.findall(text)
    python = [code for language, code in blocks if language.lower() in _PYTHON]
    if python:
        return "\n".join(python)
    return blocks[0][1] if blocks else text


def read_tests(record: Mapping[str, Any]) -> Tests:
    """The record's tests.

    Raises:
        ValueError: there are none, or they have another form.
    """
    if "test" in record and "entry_point" in record:
        entry = record["entry_point"]
        check = f"{record['test']}\ncheck({entry})"
        return Tests(prompt=record.get("prompt", ""), entry=entry, checks=(check,))
    if record.get("test_list"):
        checks = (*record["test_list"], *record.get("challenge_test_list", ()))
        return Tests(setup=record.get("test_setup_code", ""), checks=tuple(checks))
    tests = record.get("tests")
    if isinstance(tests, list | tuple) and tests:
        wrong = [
            at
            for at, test in enumerate(tests)
            if not isinstance(test, Mapping)
            or not isinstance(test.get("input"), str)
            or not isinstance(test.get("output"), str)
        ]
        if not wrong:
            return Tests(runs=tuple((test["input"], test["output"]) for test in tests))
        raise ValueError(
            f"tests[{wrong[0]}] is {tests[wrong[0]]!r:.80}; wanted "
            '{"input": text, "output": text}'
        )
    raise ValueError(
        f"the record has the fields {sorted(record)}; wanted test and entry_point, or test_list, "
        "or tests, and not empty"
    )


def whole_program(code: str, tests: Tests) -> str:
    """The code with what it goes on with: all of the prompt, or only what comes before the
    function where the code writes the function itself."""
    before = tests.prompt
    head = rf"^(?:async )?def {re.escape(tests.entry)}\b"
    if tests.entry and re.search(head, code, re.MULTILINE):
        before = re.split(head, before, maxsplit=1, flags=re.MULTILINE)[0] + "\n"
    return f"{before}{code}\n{tests.setup}".replace("\r\n", "\n")


def _same_output(found: str, wanted: str) -> bool:
    def lines(text):
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return lines(found) == lines(wanted)


def passed(code: str, tests: Tests, limits: Limits, *, isolation: str) -> tuple[int, int]:
    """(how many of the tests the code passes, how many there are).

    Each run on stdin has the limits for itself; the checks of one record share them.

    Raises:
        RuntimeError: the sandbox could not be set up.
    """
    total = len(tests.checks) or len(tests.runs)
    if len(code) > LONGEST or not _can_be_a_file(code):
        return 0, total
    program = whole_program(code, tests)
    if tests.checks:
        outcome = run(Job(program, tests.checks), limits, isolation=isolation)
        return len(outcome.held), total
    good = 0
    for given, wanted in tests.runs:
        outcome = run(Job(program, stdin=given), limits, isolation=isolation)
        clean = outcome.end == "ended" and outcome.status == 0
        good += clean and _same_output(outcome.stdout, wanted)
    return good, total


def _can_be_a_file(code: str) -> bool:
    """Whether Python could read the text as a source: no zeros, no halves of surrogate pairs."""
    return "\0" not in code and not any("\ud800" <= letter <= "\udfff" for letter in code)


def code_runs(
    *,
    decode: Decode,
    records: Records,
    allow: bool = False,
    isolation: str = "namespaces",
    score: str = "all",
    cpu_seconds: int = 5,
    wall_seconds: float | int = 20.0,
    memory_mb: int = 1024,
    timeout: float | int = 600.0,
    on_error: float | int | None = None,
    workers: int = 2,
) -> Reward:
    """1 if the completion's code passes all of the record's tests, else 0; or the share passed.

    Code that does not compile, fails, or meets a limit passes no further test. A record without
    tests, or a sandbox that cannot be set up, is an error.

    Args:
        decode: token ids -> text.
        records: (source, record) -> fields of the record.
        allow: must be True: this runs code that a model wrote on this machine.
        isolation: "namespaces", or "hook" where the machine does not let us make them.
        score: "all", or "share" of the tests.
        cpu_seconds: of each process of a run.
        wall_seconds, memory_mb: of a run, all of its processes together.
        timeout, on_error, workers: see `host_reward`; the timeout is for all runs of a completion.

    Raises:
        ValueError: it is not allowed, or this machine cannot isolate as asked.

    Example:
        >>> reward = code_runs(decode=decode, records=records, allow=True)
    """
    if not allow:
        raise ValueError(
            "code_runs: allow=False; this reward runs code that a model wrote, on this machine. "
            "Read rlhf_jax/rewards/code_sandbox.py for what holds it and what does not, then set "
            "allow=True"
        )
    for name, value, known in (("isolation", isolation, ISOLATIONS), ("score", score, SCORES)):
        if value not in known:
            raise ValueError(f"code_runs: {name}={value!r}; known: {known}")
    if min(cpu_seconds, wall_seconds, memory_mb) <= 0:
        raise ValueError(
            f"code_runs: cpu_seconds={cpu_seconds}, wall_seconds={wall_seconds}, "
            f"memory_mb={memory_mb}; wanted numbers above 0"
        )
    if isolation == "namespaces" and (why := namespaces_work()):
        raise ValueError(
            f"code_runs: isolation='namespaces' does not work on this machine: {why}; "
            "isolation='hook' needs nothing, and holds accidents only"
        )
    limits = Limits(cpu_seconds, wall_seconds, memory_mb)

    def judge(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        tests = read_tests(record)
        good, total = passed(code_of(completion), tests, limits, isolation=isolation)
        return good / total if score == "share" else float(good == total)

    return host_reward(
        "code_runs",
        judge,
        decode=decode,
        records=records,
        timeout=timeout,
        on_error=on_error,
        workers=workers,
    )
