"""The program of a worker process that says whether two answers are equal as mathematics.

Symbolic equality is that of math-verify (https://github.com/huggingface/Math-Verify, on sympy).
Its own time limits are signals, which work in a main thread only and do not stop a long power of
integers; so it runs here, without them, under limits of the kernel: a question that costs more
CPU seconds than allowed ends this process (SIGXCPU), and memory has a ceiling.

One JSON line in: {"reference": ..., "answer": ..., "cpu_seconds": ...}. Two JSON lines out:
{"read": bool} once the reference is read, then {"equal": bool}. Nothing else is ever written to
stdout, and this file imports nothing of the package.
"""

import json
import logging
import os
import resource
import sys
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

_READER = [LatexExtractionConfig(boxed_match_priority=0)]


def read_answer(text: str) -> list[Any]:
    """What the text may mean: expressions of sympy, and the text itself; [] for nothing.

    ``parsing_timeout=None`` leaves the limits to us.
    """
    return parse(f"\\boxed{{{text}}}", _READER, parsing_timeout=None, extraction_mode="first_match")


def _allow(cpu_seconds: int) -> None:
    """So much CPU time from now on; the kernel counts in whole seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + 1 + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _equal(reference: list[Any], text: str) -> bool:
    """Whether the text means the reference; one too deep or too large to be read does not.

    Without `strict` the names of variables would not matter: x + 1 would be y + 1.
    """
    try:
        return verify(reference, read_answer(text), strict=True, timeout_seconds=None)
    except (MemoryError, RecursionError):
        return False


def main(memory_bytes: int) -> None:
    """Answers questions until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)  # a grader must not hold up the process that drives the accelerators
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply

    def reply(**values: bool) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    reply(ready=verify(read_answer("\\frac{1}{2}"), read_answer("0.5"), timeout_seconds=None))
    for line in sys.stdin:
        question = json.loads(line)
        _allow(question["cpu_seconds"])
        reference = read_answer(question["reference"])
        reply(read=bool(reference))
        reply(equal=_equal(reference, question["answer"]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
