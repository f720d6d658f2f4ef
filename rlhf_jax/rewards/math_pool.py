"""Worker processes that compare answers, one question each at a time, and are killed at a limit.

Host rewards run on threads, and a thread cannot be stopped; a process can. See `math_worker`.
"""

import json
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from typing import Any, NamedTuple

PROGRAM = pathlib.Path(__file__).with_name("math_worker.py")
MEMORY = 2 << 30  # bytes of address space per worker
_START = 120.0  # seconds of wall time for a worker's imports, which are seconds of CPU time
# A worker ends by itself at its limit of CPU time. The wall may be this many times slower, on a
# machine that is busy, before we call the worker lost.
_PATIENCE = 100.0
# How a worker ends that an answer was too much for: its limit of CPU time, a stack that overflowed
# in C, memory that C could not have. Any other end is a fault of the grader.
_TOO_MUCH = {-signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT}


class Worker(NamedTuple):
    """A process, and the file that takes what it writes to stderr."""

    process: subprocess.Popen
    errors: Any  # an unnamed file, opened for bytes


def _start() -> Worker:
    errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by _stop
    process = subprocess.Popen(
        [sys.executable, "-P", str(PROGRAM), str(MEMORY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    worker = Worker(process, errors)
    if _read(worker, _START) != {"ready": True}:
        raise RuntimeError(f"a worker for mathematical equality did not start: {_stop(worker)}")
    return worker


def _read(worker: Worker, seconds: float) -> dict[str, bool] | None:
    """The worker's next reply; None if it ended before that, at a limit of its own or of ours."""
    clock = threading.Timer(seconds, worker.process.kill)
    clock.daemon = True
    clock.start()
    line = worker.process.stdout.readline()
    clock.cancel()
    return json.loads(line) if line else None


def _stop(worker: Worker) -> str:
    """Kills the worker, if it still runs; what it left on stderr, and how it ended."""
    worker.process.kill()
    worker.process.wait()
    worker.process.stdin.close()
    worker.process.stdout.close()
    worker.errors.seek(0)
    said = worker.errors.read().decode(errors="replace").strip()
    worker.errors.close()
    return f"exit status {worker.process.returncode}, stderr {said[-500:]!r}"


def _stop_all(idle: queue.SimpleQueue) -> None:
    while not idle.empty():
        _stop(idle.get_nowait())


class Pool:
    """Compares answers on processes that start when first needed and are used again.

    There are as many as threads ask at once. They end with the pool, or with this program.
    """

    def __init__(self, cpu_seconds: int):
        self.cpu_seconds = cpu_seconds
        self._idle: queue.SimpleQueue = queue.SimpleQueue()
        weakref.finalize(self, _stop_all, self._idle)

    def _take(self) -> Worker:
        """A worker that waits, or a new one; one that was killed while it waited is dropped."""
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                return _start()
            if worker.process.poll() is None:
                return worker
            _stop(worker)

    def equal(self, reference: str, answer: str) -> bool:
        """Whether `answer` is mathematically `reference`.

        An answer that the worker dies of (time, memory, nesting) is not equal: nobody can show
        that it is. The reference is read first, and dying of that is an error.

        Raises:
            RuntimeError: the reference cannot be read, a worker could not be started or broke.
        """
        worker = self._take()
        question = {"reference": reference, "answer": answer, "cpu_seconds": self.cpu_seconds}
        worker.process.stdin.write(json.dumps(question) + "\n")
        worker.process.stdin.flush()
        patience = _PATIENCE * self.cpu_seconds
        read = _read(worker, patience)
        if read is None:
            raise RuntimeError(
                f"the reference {reference[:80]!r} could not be read within "
                f"{self.cpu_seconds} CPU seconds: {_stop(worker)}"
            )
        verdict = _read(worker, patience)
        if verdict is None:
            end = _stop(worker)
            if worker.process.returncode not in _TOO_MUCH:
                raise RuntimeError(f"a worker broke over {answer[:80]!r}: {end}")
            return False
        self._idle.put(worker)
        if not read["read"]:
            raise RuntimeError(f"the reference {reference[:80]!r} is no mathematics")
        return verdict["equal"]
