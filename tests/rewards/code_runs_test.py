"""Code by its tests: three forms of records. What holds code that means harm: code_sandbox_test."""

import numpy as np
import pytest

from rlhf_jax.rewards.code_runs import code_of, code_runs, passed, read_tests, whole_program
from rlhf_jax.rewards.code_sandbox import Limits, namespaces_work
from tests.rewards.examples import TOKENIZER, spell

BEST = "hook" if namespaces_work() else "namespaces"
LIMITS = Limits(cpu_seconds=1, wall_seconds=30.0, memory_mb=256)
ADD = {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]}
HUMAN = {
    "prompt": 'import math\n\n\ndef area(r):\n    """The area of a circle."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(2) - 4 * 3.14159) < 0.01\n",
}
STDIN = {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "4"}]}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```\nthen\n```Python\ny = 2\n```\n```\n3\n```", "x = 1\n\ny = 2\n"),
        ("```\nx = 1\n```\n```\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("", ""),
    ],
)
def test_which_code_a_text_holds(text, code):
    assert code_of(text) == code


def test_programs():
    tests = read_tests(HUMAN)
    whole = "def area(r):\n    return math.pi * r * r\n"
    assert whole_program(whole, tests).count("def area") == 1
    assert whole_program(whole, tests).startswith("import math\n")
    assert whole_program("    return 1\n", tests).startswith(HUMAN["prompt"] + "    return 1\n")
    later = {"test_setup_code": "root = 1", "test_list": ["assert root"]}
    assert whole_program("x = 1\r\n", read_tests(later)) == "x = 1\n\nroot = 1"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "wanted test and entry_point, or test_list, or tests"),
        ({"tests": []}, "and not empty"),
        ({"tests": [{"input": "1"}]}, r"tests\[0\] is .*wanted"),
        ({"tests": [{"input": "1", "output": 1}]}, r"tests\[0\]"),
        ({"tests": "assert"}, "wanted test and entry_point"),
    ],
)
def test_a_record_without_tests_is_an_error(record, message):
    with pytest.raises(ValueError, match=message):
        read_tests(record)


def scored(completions, record, **values):
    reward = code_runs(
        decode=TOKENIZER.decode,
        records=lambda source, at: record,
        allow=True,
        isolation=BEST,
        cpu_seconds=1,
        **values,
    )
    rollouts = spell(["q"], completions, group=len(completions))
    return np.asarray(reward.score(reward.init(), rollouts)[0].outcome).tolist()


def test_asserts():
    good = "```python\ndef add(a, b):\n    return a + b\n```"
    half = "def add(a, b):\n    return 4"
    broken = "def add(a, b:"
    assert scored([good, half, broken, ""], ADD) == [1, 0, 0, 0]
    assert scored([good, half, broken, ""], ADD, score="share") == [1, 0.5, 0, 0]


def test_a_function_that_goes_on_or_is_whole():
    whole = "```python\ndef area(r):\n    return math.pi * r * r\n```"
    assert scored(["    return math.pi * r * r\n", whole, "    return 1\n"], HUMAN) == [1, 1, 0]


def test_programs_on_stdin():
    good = "a, b = map(int, input().split())\nprint(a + b, '')"
    noisy = "import sys\n" + good + "\nsys.exit(1)"
    half = "if __name__ == '__main__':\n    print(3)"
    assert scored([good, noisy, half], STDIN, score="share") == [1, 0, 0.5]


def test_it_is_off_until_it_is_allowed():
    with pytest.raises(ValueError, match="allow=False; this reward runs code that a model wrote"):
        code_runs(decode=TOKENIZER.decode, records=lambda source, at: ADD)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(isolation="jail"), "isolation='jail'; known"),
        (dict(score="most"), "score='most'; known"),
        (dict(cpu_seconds=0), "cpu_seconds=0.*above 0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        code_runs(decode=TOKENIZER.decode, records=lambda source, at: ADD, allow=True, **values)


def test_a_machine_that_cannot_isolate_is_told_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    namespaces_work.cache_clear()
    with pytest.raises(ValueError, match=r"does not work on this machine: .*unshare.*hook"):
        code_runs(decode=TOKENIZER.decode, records=lambda source, at: ADD, allow=True)
    namespaces_work.cache_clear()


def test_what_python_cannot_read_as_a_source_passes_nothing():
    tests = read_tests(ADD)
    for code in ("x = 1\0", "x = '\ud800'", "x" * 200_000):
        assert passed(code, tests, LIMITS, isolation=BEST) == (0, 2)
