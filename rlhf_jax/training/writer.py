"""What a run writes down: metrics.jsonl, samples.jsonl, tensorboard/, summary.json, progress.

Files are plain and append-only, one JSON object with sorted keys per line. Process 0 writes;
on the other processes every method does nothing.

JSON has no NaN or infinity: both are written as ``null``, and TensorBoard, which can show them,
gets the value itself. A mean over nothing is such a NaN, so this is not worth a warning.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

_WINDOW = 20  # steps whose median duration foretells the rest
_log = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: floats from scalars and arrays, null for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return plain(value.tolist())  # numpy and JAX scalars and arrays


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Writes a JSON file with sorted keys, whole or not at all."""
    text = json.dumps(plain(content), indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        OSError: naming the file.
    """
    write_parts(path, [text])


def write_parts(path: str | os.PathLike, parts: Iterable[str]) -> None:
    """Writes a file part by part, as they come; it is there whole in the end, or not at all.

    Raises:
        OSError: naming the file.
    """
    path = pathlib.Path(path)
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with _naming(draft), draft.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)  # what a full disk left of it


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Names the file in an OSError: a write to an open file does not say which it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


def keep_before(path: pathlib.Path, step: int) -> None:
    """Drops the lines of `step` and later, which a resumed run writes again, and a torn last line.

    Raises:
        ValueError: naming file and line, if a whole line is not a JSON object with a step.
    """
    if not path.exists():
        return
    draft = path.with_name(f"{path.name}.tmp")
    with path.open(encoding="utf-8") as old, draft.open("w", encoding="utf-8") as new:
        for number, line in enumerate(old, 1):
            if not line.endswith("\n"):
                _log.warning("%s:%d is cut off and left out", path, number)
                continue
            try:
                written = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is not a line of a run: {error}") from error
            if written < step:
                new.write(line)
    os.replace(draft, path)


class Writer:
    """Writes one run's files.

    Example:
        >>> with Writer("runs/a", resumed=0) as writer:
        ...     writer.scalars(0, {"update/loss": 0.5})
        ...     writer.summary({"update/loss": 0.5})
    """

    def __init__(self, workdir: str | os.PathLike, *, resumed: int = 0):
        """Opens the files of `workdir`; lines of step `resumed` and later are dropped.

        Args:
            resumed: the first step that will be written (the number of steps already done).
        """
        self._folder = pathlib.Path(workdir)
        self._active = jax.process_index() == 0
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._last_progress: tuple[int, float] | None = None  # steps done, and when
        if not self._active:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lines = {}
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_before(self._folder / name, resumed)
            # Line buffered: a killed process loses nothing that was written.
            self._lines[name] = (self._folder / name).open("a", buffering=1, encoding="utf-8")
        self._events = _open_events(self._folder / "tensorboard", resumed)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, {"step": step, **values}, and the same in TensorBoard."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        self._append("metrics.jsonl", {**numbers, "step": step})
        tags = [summary_pb2.Summary.Value(tag=n, simple_value=x) for n, x in numbers.items()]
        event = event_pb2.Event(
            wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=tags)
        )
        with _naming(self._folder / "tensorboard"):
            self._events.write(event.SerializeToString())
            self._events.flush()

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """One line of samples.jsonl per row, {"step": step, **row}."""
        if not self._active:
            return
        for row in rows:
            self._append("samples.jsonl", {**row, "step": step})

    def summary(self, values: Mapping[str, Any]) -> None:
        """summary.json, whole or not at all: its presence means that the run ended well."""
        if self._active:
            write_json(self._folder / "summary.json", values)

    def progress(self, done: int, steps: int, values: Mapping[str, Any]) -> None:
        """Prints one line: steps done, time left by the median of recent steps, some metrics."""
        now = time.monotonic()
        if self._last_progress is not None and done > self._last_progress[0]:
            before, then = self._last_progress
            self._durations.append((now - then) / (done - before))
        self._last_progress = (done, now)
        if not self._active:
            return
        parts = [f"step {done}/{steps}"]
        if self._durations:
            each = statistics.median(self._durations)
            parts += [f"{each:.3g} s/step", f"{_clock(each * (steps - done))} left"]
        parts += [f"{name} {float(value):.4g}" for name, value in values.items()]
        print(" | ".join(parts), file=sys.stdout, flush=True)

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        if self._active:
            with _naming(self._folder), contextlib.ExitStack() as stack:
                for file in (*self._lines.values(), self._events):
                    stack.callback(file.close)  # all of them, also where one cannot be flushed

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def _append(self, name: str, content: Mapping[str, Any]) -> None:
        line = json.dumps(plain(content), sort_keys=True, allow_nan=False)
        with _naming(self._folder / name):
            self._lines[name].write(line + "\n")


def _open_events(folder: pathlib.Path, resumed: int) -> RecordWriter:
    """An event file written through a plain file: TensorBoard's own writer class would import
    tensorflow where it is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
    events = RecordWriter((folder / name).open("wb"))
    now = time.time()
    events.write(event_pb2.Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    if resumed:
        # Tells TensorBoard to drop what older files of this run say about later steps.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        event = event_pb2.Event(wall_time=now, step=resumed, session_log=start)
        events.write(event.SerializeToString())
    events.flush()
    return events


def _clock(seconds: float) -> str:
    """Seconds as "1 h 02 min", "2 min 03 s" or "4 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
