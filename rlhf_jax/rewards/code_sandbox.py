"""Runs a model's code in a process of its own, with limits, and says what came of it.

What it protects against, with ``isolation="namespaces"`` (Linux, where users may make namespaces):
endless loops, memory, output and files without end (limits), processes left behind (all are
killed), the network (there is none), changes to any file of the machine (all are read-only to it).
What it does not: the code can read every file that this program's user can read, it shares the
kernel, and for the length of the run it can start many processes. With ``isolation="hook"`` the
network, other programs and files are denied by a hook inside Python alone, which stops accidents
and not intent; use it where something outside, a container or a virtual machine, keeps the code in.

Neither stops code that cheats on its checks: it runs in one process with them, and an object that
says it equals everything passes an assert.
"""

import contextlib
import functools
import json
import os
import pathlib
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

ISOLATIONS = ("namespaces", "hook")
PROGRAM = pathlib.Path(__file__).with_name("code_child.py")
_UNSHARE = (
    "unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--mount", "--mount-proc",
    "--fork", "--kill-child=SIGKILL", "--",
)  # fmt: skip
_CHUNK = 1 << 16
_START = 60.0  # seconds of wall time for Python to start, on a machine that is busy


class Limits(NamedTuple):
    """What a run may use; whichever limit it meets first ends it."""

    cpu_seconds: int = 5
    wall_seconds: float | int = 20.0
    memory_mb: int = 1024
    output_bytes: int = 1 << 20
    file_mb: int = 16


class Job(NamedTuple):
    """Code; checks that run after it, among its names; or, without checks, what stdin holds."""

    code: str
    checks: tuple[str, ...] = ()
    stdin: str = ""


class Outcome(NamedTuple):
    """Which checks held, what was written to stdout, and how the run ended.

    `end` is "ended", "wall" or "output"; `status` is not 0 where the code or a limit of the
    kernel ended it.
    """

    held: frozenset[int]
    stdout: str
    end: str
    status: int


@functools.cache
def namespaces_work() -> str:
    """Why this machine does not let us make namespaces and close them; empty if it does."""
    if shutil.which("unshare") is None:
        return "there is no program 'unshare' (of util-linux)"
    try:
        run(Job("", ("pass",)), Limits(), isolation="namespaces")
    except RuntimeError as error:
        return str(error)
    return ""


def run(job: Job, limits: Limits, *, isolation: str) -> Outcome:
    """Runs the job to its end or to a limit; nothing of it is left behind.

    Raises:
        RuntimeError: the process could not be set up; nothing of the job ran.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="code_", ignore_cleanup_errors=True) as folder:
        request = {
            **job._asdict(),
            "word": word,
            "folder": folder,
            "isolation": isolation,
            "limits": {
                "cpu_seconds": limits.cpu_seconds,
                "memory_bytes": limits.memory_mb << 20,
                "file_bytes": limits.file_mb << 20,
            },
        }
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
            given.write(json.dumps(request).encode())
            given.seek(0)
            said, stdout, end, status = _watch(given, errors, folder, limits, isolation, word)
            errors.seek(0)
            complaint = errors.read()[-500:].decode(errors="replace").strip()
    lines = [line.partition(" ") for line in said.decode(errors="replace").splitlines()]
    told = [rest for first, _, rest in lines if first == word]
    if "ready" not in told:
        raise RuntimeError(
            f"no process for code could be set up ({isolation}, {end}, status {status}): "
            f"{complaint!r}"
        )
    held = frozenset(int(number) for number in told if number.isdecimal())
    return Outcome(held, stdout.decode(errors="replace"), end, status)


def _watch(
    given: Any, errors: Any, folder: str, limits: Limits, isolation: str, word: str
) -> tuple[bytes, bytes, str, int]:
    """(what the child said, stdout, how it ended, status): runs one process to its end."""
    reader, writer = os.pipe()
    command = [sys.executable, "-I", "-B", str(PROGRAM), str(writer)]
    with os.fdopen(reader, "rb") as told:
        process = subprocess.Popen(
            [*(_UNSHARE if isolation == "namespaces" else ()), *command],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=(writer,),
            cwd=folder,
            env={
                "PATH": os.defpath,
                "HOME": folder,
                "TMPDIR": folder,
                "LANG": "C.UTF-8",
                "PYTHONHASHSEED": "0",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            start_new_session=True,  # a process group of its own, to be killed as one
        )
        os.close(writer)
        with process:
            try:
                said, stdout, end = _collect(told, process.stdout, limits, word.encode())
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    return said, stdout, end, process.returncode


def _collect(told: Any, stdout: Any, limits: Limits, word: bytes) -> tuple[bytes, bytes, str]:
    """What the child says on its pipe and what it prints, until it ends or meets a limit.

    The clock starts with the child's first word: it is the code that is timed, not Python.
    """
    gathered = {told: b"", stdout: b""}
    deadline, started = time.monotonic() + _START, False
    with selectors.DefaultSelector() as waiting:
        for pipe in gathered:
            os.set_blocking(pipe.fileno(), False)
            waiting.register(pipe, selectors.EVENT_READ)
        while waiting.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return gathered[told], gathered[stdout], "wall"
            for key, _ in waiting.select(left):
                chunk = os.read(key.fd, _CHUNK)
                if not chunk:
                    waiting.unregister(key.fileobj)
                gathered[key.fileobj] += chunk
                if len(gathered[key.fileobj]) > limits.output_bytes:
                    return gathered[told], gathered[stdout], "output"
            if not started and word in gathered[told]:
                started, deadline = True, time.monotonic() + limits.wall_seconds
    return gathered[told], gathered[stdout], "ended"
