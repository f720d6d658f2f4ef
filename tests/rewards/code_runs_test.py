"""Code by its tests: three forms of records, and code that means harm or only goes wrong.

Where this machine does not let us make namespaces the sandbox's tests run with the hook alone.
"""

import os
import pathlib
import sys
import time

import numpy as np
import pytest

from rlhf_jax.rewards import code_sandbox
from rlhf_jax.rewards.code_runs import code_of, code_runs, passed, read_tests, whole_program
from rlhf_jax.rewards.code_sandbox import Job, Limits, namespaces_work, run
from tests.rewards.examples import TOKENIZER, spell

AVAILABLE = [*(() if namespaces_work() else ("namespaces",)), "hook"]
BEST = AVAILABLE[0]
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


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_a_sandbox_that_cannot_be_set_up_is_an_error_and_no_zero(isolation, monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    broken.write_text("raise SystemExit('no')")
    monkeypatch.setattr(code_sandbox, "PROGRAM", broken)
    with pytest.raises(RuntimeError, match=r"no process for code could be set up.*no'"):
        run(Job("x = 1", ("assert x",)), LIMITS, isolation=isolation)


def test_what_python_cannot_read_as_a_source_passes_nothing():
    tests = read_tests(ADD)
    for code in ("x = 1\0", "x = '\ud800'", "x" * 200_000):
        assert passed(code, tests, LIMITS, isolation=BEST) == (0, 2)


NO_PASS = {
    "endless": "while True:\n    pass",
    "memory": "x = bytearray(10**9)",
    "a file": "open('big', 'wb').write(bytes(10**8))",
    "leaves before the checks": "import os\nos._exit(0)",
    "leaves in a check": "def held():\n    raise SystemExit(0)",
    "recursion": "def held():\n    return held()",
    "evil names": "held = __import__('sys').exit",
    "the network": "import socket\nsocket.create_connection(('1.1.1.1', 53), 1)",
    "names": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "tells": "import os\nfor pipe in range(3, 20):\n    try:\n        os.write(pipe, b'0\\n')\n"
    "    except OSError:\n        pass\ndef held():\n    return False",
}


@pytest.mark.parametrize("isolation", AVAILABLE)
@pytest.mark.parametrize("name", NO_PASS)
def test_code_that_fails_or_means_harm_passes_nothing(name, isolation):
    job = Job(NO_PASS[name], ("assert held() is True",))
    assert run(job, LIMITS, isolation=isolation).held == frozenset()


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_files_of_the_machine_stay_as_they_are(isolation, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("here")
    for harm in (f"os.remove({str(victim)!r})", f"open({str(victim)!r}, 'w').write('gone')",
                 f"open({str(tmp_path / 'new')!r}, 'w')", f"os.mkdir({str(tmp_path / 'new')!r})",
                 f"import shutil; shutil.rmtree({str(tmp_path)!r})"):  # fmt: skip
        assert not run(Job(f"import os\n{harm}", ("pass",)), LIMITS, isolation=isolation).held
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "here"


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_code_has_a_folder_of_its_own_for_a_while(isolation):
    code = (
        "import os, tempfile\nopen('a', 'w').write('b')\nassert open('a').read() == 'b'\n"
        "os.remove('a')\ntempfile.TemporaryFile().write(b'c')\nprint(os.getcwd())"
    )
    outcome = run(Job(code), LIMITS, isolation=isolation)
    assert (outcome.end, outcome.status) == ("ended", 0)
    assert not pathlib.Path(outcome.stdout.strip()).exists()


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_secrets_of_the_environment_are_not_there(isolation, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    outcome = run(Job("import os\nprint(dict(os.environ))"), LIMITS, isolation=isolation)
    assert "PATH" in outcome.stdout and "hunter2" not in outcome.stdout


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_output_and_waiting_have_limits(isolation):
    limits = LIMITS._replace(output_bytes=1000, wall_seconds=1.0)
    outcome = run(Job("while True:\n    print('x' * 100)"), limits, isolation=isolation)
    assert outcome.end == "output" and len(outcome.stdout) < 1000 + (1 << 16) + 1
    start = time.monotonic()
    outcome = run(Job("import time\ntime.sleep(1000)"), limits, isolation=isolation)
    assert outcome.end == "wall" and time.monotonic() - start < 100


@pytest.mark.skipif("namespaces" not in AVAILABLE, reason="no namespaces on this machine")
def test_processes_that_leave_the_group_die_too():
    marker = f"left_behind_{os.getpid()}"
    code = (
        "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        os.execv({sys.executable!r}, ['python', '-c', 'import time; "
        f"time.sleep(999) # {marker}'])\ntime.sleep(0.3)"
    )
    assert run(Job(code, ("pass",)), LIMITS, isolation="namespaces").held == {0}
    time.sleep(0.3)
    commands = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    assert any("pytest" in command for command in commands)
    assert not any(marker in command for command in commands)


@pytest.mark.skipif("namespaces" not in AVAILABLE, reason="no namespaces on this machine")
def test_the_doors_cannot_be_opened_from_within():
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
writable = 4096 | 32  # MS_BIND | MS_REMOUNT, without MS_RDONLY
print(libc.mount(b"none", b"/", None, writable, None))
libc.unshare(0x10000000 | 0x20000)  # a user namespace within, with capabilities of its own
print(libc.mount(b"none", b"/", None, writable, None))
try:
    open("/written", "w")
except OSError as error:
    print(error.strerror)
"""
    outcome = run(Job(code), LIMITS, isolation="namespaces")
    assert outcome.stdout.splitlines() == ["-1", "-1", "Read-only file system"]
