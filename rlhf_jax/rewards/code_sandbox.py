"""Runs a model's code in a process of its own, with limits, and says what came of it.

What it protects against, with ``isolation="namespaces"`` (Linux, where users may make namespaces):

- endless loops, output and files without end: limits;
- memory and processes without end: all that the code starts is counted together, twenty times a
  second, and ended above a limit;
- processes left behind: all are killed;
- the network: there is none;
- the machine: of its files the code sees the interpreter's folders, the system's programs and
  libraries, and nothing else, all read-only. So there are no sockets or pipes of other programs,
  no devices but null, zero and the random ones, and no files of the user.

What it does not: the code shares the kernel, whose faults are its ways out. It can use every core
until the wall time ends, for CPU time is counted per process. Between two looks memory may pass its
limit, and what code holds without mapping it (parts of shared memory, buffers of pipes) is not
seen; where the machine's memory ends, the kernel takes the code before anything else. Packages
outside of the interpreter's folders are not there for the code.

With ``isolation="hook"`` the network, other programs and files are denied by a hook inside Python
alone, which stops accidents and not intent; use it where something outside, a container or a
virtual machine, keeps the code in. Processes are counted together where there is a /proc.

Neither stops code that cheats on its checks. They run in one process with it, and what that process
says the code can say: an object that equals everything passes an assert; code that looks for the
checks finds what they expect; code made for this sandbox can read the word of a check and say it
without the check, though none is in memory before. Tests on stdin and stdout are compared here,
where the code is not, and cannot be forged so: train on those where there is a choice.
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
    "unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--mount", "--fork",
    "--kill-child=SIGKILL", "--",
)  # fmt: skip
_CHUNK = 1 << 16
_START = 60.0  # seconds of wall time for Python to start, on a machine that is busy
_LOOK = 0.05  # seconds between two looks at all processes of a run
_CHILDREN = pathlib.Path("/proc/thread-self/children")  # not in every kernel


class Limits(NamedTuple):
    """What a run may use; whichever limit it meets first ends it."""

    cpu_seconds: int = 5
    wall_seconds: float | int = 20.0
    memory_mb: int = 1024  # of each process, and of all together
    output_bytes: int = 1 << 20
    file_mb: int = 16
    tasks: int = 128  # processes and threads


class Job(NamedTuple):
    """Code; checks that run after it, among its names; or, without checks, what stdin holds."""

    code: str
    checks: tuple[str, ...] = ()
    stdin: str = ""


class Outcome(NamedTuple):
    """Which checks held, what was written to stdout, and how the run ended.

    `end` is "ended", or the limit that ended it here: "wall", "output", "memory" or "tasks";
    `status` is not 0 where the code or a limit of the kernel ended it.
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
    if isolation == "namespaces" and not _CHILDREN.exists():
        raise RuntimeError(f"this kernel has no {_CHILDREN}, by which memory is counted")
    words = [secrets.token_hex(16).encode() for _ in job.checks]
    with tempfile.TemporaryDirectory(prefix="code_", ignore_cleanup_errors=True) as folder:
        request = {
            **job._asdict(),
            "folder": folder,
            "isolation": isolation,
            "limits": {
                "cpu_seconds": limits.cpu_seconds,
                "memory_bytes": limits.memory_mb << 20,
                "file_bytes": limits.file_mb << 20,
                "tasks": limits.tasks,
            },
        }
        with (
            _file(json.dumps(request).encode()) as given,
            _file(b"".join(words)) as hidden,
            _file(b"") as errors,
        ):
            said, stdout, end, status = _watch(given, hidden, errors, folder, limits, isolation)
            errors.seek(0)
            complaint = errors.read()[-500:].decode(errors="replace").strip()
    first, *told = said.splitlines() or [b""]
    if first != b"ready":
        raise RuntimeError(
            f"no process for code could be set up ({isolation}, {end}, status {status}): "
            f"{complaint!r}"
        )
    held = frozenset(number for number, word in enumerate(words) if word in told)
    return Outcome(held, stdout.decode(errors="replace"), end, status)


def _file(content: bytes) -> Any:
    """A file without a name."""
    file = tempfile.TemporaryFile()  # noqa: SIM115, the caller closes it
    file.write(content)
    file.seek(0)
    return file


def _watch(
    given: Any, hidden: Any, errors: Any, folder: str, limits: Limits, isolation: str
) -> tuple[bytes, bytes, str, int]:
    """(what the child said, stdout, how it ended, status): runs one process to its end."""
    reader, writer = os.pipe()
    command = [sys.executable, "-I", "-B", str(PROGRAM), str(writer), str(hidden.fileno())]
    home = "/tmp" if isolation == "namespaces" else folder
    with os.fdopen(reader, "rb") as told:
        process = subprocess.Popen(
            [*(_UNSHARE if isolation == "namespaces" else ()), *command],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=(writer, hidden.fileno()),
            cwd=folder,
            env={
                "PATH": os.defpath,
                "HOME": home,
                "TMPDIR": home,
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
                said, stdout, end = _collect(told, process, limits)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    return said, stdout, end, process.returncode


def _collect(
    told: Any, process: subprocess.Popen[bytes], limits: Limits
) -> tuple[bytes, bytes, str]:
    """What the child says on its pipe and what it prints, until it ends or meets a limit.

    The clock starts with the child's first word: it is the code that is timed, not Python.
    """
    gathered = {told: b"", process.stdout: b""}
    deadline, started, end = time.monotonic() + _START, False, "ended"
    look = time.monotonic() + _LOOK
    with selectors.DefaultSelector() as waiting:
        for pipe in gathered:
            os.set_blocking(pipe.fileno(), False)
            waiting.register(pipe, selectors.EVENT_READ)
        while waiting.get_map() and end == "ended":
            for key, _ in waiting.select(max(0.0, min(look, deadline) - time.monotonic())):
                chunk = os.read(key.fd, _CHUNK)
                if not chunk:
                    waiting.unregister(key.fileobj)
                gathered[key.fileobj] += chunk
                if len(gathered[key.fileobj]) > limits.output_bytes:
                    end = "output"
            now = time.monotonic()
            if not started and gathered[told]:
                started, deadline = True, now + limits.wall_seconds
            if end == "ended" and now >= look:
                end, look = _excess(process.pid, limits), now + _LOOK
            if end == "ended" and now >= deadline:
                end = "wall"
    return gathered[told], gathered[process.stdout], end


def _excess(first: int, limits: Limits) -> str:
    """Which limit all processes of a run meet together; "ended" if none.

    What processes share counts once: Σ resident memory of each is at least as much as they hold,
    and where that is too much Σ proportional shares (Pss) decides.
    """
    found, tasks, waiting = [], 0, [first] if _CHILDREN.exists() else []
    while waiting:
        found.append(waiting.pop())
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            for task in os.listdir(f"/proc/{found[-1]}/task"):
                tasks += 1
                path = f"/proc/{found[-1]}/task/{task}/children"
                waiting += map(int, pathlib.Path(path).read_text().split())
    if tasks > limits.tasks:
        return "tasks"
    for measure in (_resident, _share):
        if sum(map(measure, found)) <= limits.memory_mb << 20:
            return "ended"
    return "memory"


def _resident(process: int) -> int:
    """Bytes of memory that a process has, with all that it shares."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        pages = pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _share(process: int) -> int:
    """The same, where what n processes share counts 1/n in each; all of it if we may not know."""
    try:
        text = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:
        return _resident(process)
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line[:4] == "Pss:")
