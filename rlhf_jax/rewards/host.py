"""How rewards in Python meet arrays on devices: rows as text, calls on threads, arrays again.

A process decodes and judges the rows that its own devices hold, no others, and the judged values
become one array with the sharding of the rollouts. A batch is decoded once, however many rewards
read it.
"""

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from rlhf_jax.types import Array, Reward, Rollouts, Scores

Decode = Callable[[list[int]], str]
Records = Callable[[int, int], Mapping[str, Any]]  # (source, record) -> the record's fields

_POLL = 0.05  # seconds between looks at the clock while calls are running


class Row(NamedTuple):
    """One rollout as text, with where its prompt came from."""

    prompt: str
    completion: str
    source: int
    record: int


class HostBatch:
    """The rollouts of one batch and, once asked for, this process's rows as text."""

    def __init__(self, rollouts: Rollouts):
        self.rollouts = rollouts
        self._rows: dict[Decode, dict[int, Row]] = {}

    def rows(self, decode: Decode) -> dict[int, Row]:
        """This process's rows by their index in the batch; each decoder runs once."""
        if decode not in self._rows:
            self._rows[decode] = _decode_rows(self.rollouts, decode)
        return self._rows[decode]


@dataclasses.dataclass(frozen=True)
class HostScore:
    """The `score` of a reward on the host. `combine` calls `judge` with a batch that is shared,
    so that members do not decode it again."""

    judge: Callable[[Any, HostBatch], tuple[Scores, Any]]

    def __call__(self, state: Any, rollouts: Rollouts) -> tuple[Scores, Any]:
        return self.judge(state, HostBatch(rollouts))


def local_rows(array: Shaped[Array, "B ..."]) -> dict[int, np.ndarray | np.generic]:
    """The rows of a global array that this process holds, by global index."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return dict(enumerate(np.asarray(array)))
    rows = {}
    for shard in array.addressable_shards:
        if shard.data.shape[1:] != array.shape[1:]:
            raise ValueError(
                f"rows are split over devices: shard {shard.data.shape} of {array.shape}; "
                "host rewards need rollouts sharded by rows only"
            )
        start = shard.index[0].start or 0
        if start not in rows:
            rows.update(enumerate(np.asarray(shard.data), start))
    return rows


def _decode_rows(rollouts: Rollouts, decode: Decode) -> dict[int, Row]:
    prompts = rollouts.prompts
    group = rollouts.group_size
    tokens, mask = local_rows(rollouts.tokens), local_rows(rollouts.mask)
    prompt_tokens, prompt_mask = local_rows(prompts.tokens), local_rows(prompts.mask)
    source, record = local_rows(prompts.source), local_rows(prompts.record)
    texts = {}  # a prompt is decoded once for its whole group
    rows = {}
    for index in sorted(tokens):
        prompt = index // group
        if prompt not in texts:
            texts[prompt] = decode(prompt_tokens[prompt][prompt_mask[prompt]].tolist())
        rows[index] = Row(
            prompt=texts[prompt],
            completion=decode(tokens[index][mask[index]].tolist()),
            source=int(source[prompt]),
            record=int(record[prompt]),
        )
    return rows


def spread(values: Mapping[int, float], like: Shaped[Array, " B"]) -> Float[Array, " B"]:
    """One float32 value per row as an array with the sharding of `like`."""

    def read(index):
        rows = range(like.shape[0])[index[0]]
        return np.asarray([values[row] for row in rows], np.float32)

    if isinstance(like, np.ndarray):
        return jnp.asarray(read((slice(None),)))
    return jax.make_array_from_callback(like.shape, like.sharding, read)


def zeros(like: Shaped[Array, "B T"]) -> Float[Array, "B T"]:
    """Float32 zeros with the shape and sharding of `like`."""
    if isinstance(like, np.ndarray):
        return jnp.zeros(like.shape, jnp.float32)
    blank = np.zeros(like.shape, np.float32)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: blank[index])


def run_all(
    calls: Sequence[Callable[[], float]], *, timeout: float | int, workers: int
) -> Iterator[tuple[int, float | BaseException]]:
    """Runs the calls on threads and yields (index, result or exception) as they end.

    A call that runs longer than `timeout` seconds, counted from its own start, yields a
    `TimeoutError` and its thread is replaced: Python cannot stop a thread, so the old one is left
    to end on its own. Threads are daemons, so one that never ends does not keep the program
    alive. Closing the iterator drops the calls that have not started.
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    running: dict[int, float] = {}  # when each call began
    given_up: set[int] = set()
    for index in range(len(calls)):
        todo.put(index)

    def work():
        while True:
            try:
                index = todo.get_nowait()
            except queue.Empty:
                return
            running[index] = time.monotonic()
            try:
                done.put((index, float(calls[index]())))
            except (Exception, SystemExit) as error:
                # Any fault of a verifier is handed to the caller, who raises it again or counts
                # it: here it would only end the thread in silence.
                done.put((index, error))
            del running[index]
            if index in given_up:
                return  # this thread was replaced

    def hire(count):
        for _ in range(count):
            threading.Thread(target=work, daemon=True, name="verifier").start()

    hire(min(workers, len(calls)))
    ended: set[int] = set()
    try:
        while len(ended) < len(calls):
            try:
                index, result = done.get(timeout=_POLL)
                if index not in ended:
                    ended.add(index)
                    yield index, result
            except queue.Empty:
                pass
            now = time.monotonic()
            late = [i for i, start in list(running.items()) if now - start > timeout]
            for index in late:
                if index not in ended:
                    ended.add(index)
                    given_up.add(index)
                    hire(1)
                    yield index, TimeoutError(f"no answer within {timeout:g} s")
    finally:
        while not todo.empty():
            try:
                todo.get_nowait()
            except queue.Empty:
                break


def host_reward(
    name: str,
    fn: Callable[[str, str, Mapping[str, Any]], float],
    *,
    decode: Decode,
    records: Records,
    timeout: float | int = 10.0,
    on_error: float | int | None = None,
    workers: int = 8,
) -> Reward:
    """A reward from a function ``fn(prompt, completion, record) -> float`` on CPU threads.

    A call that raises, gives NaN or infinity, or takes longer than `timeout` seconds is an error
    that names source and record. With `on_error` it scores that value instead, and the part
    ``<name>/failures`` is 1 on that row, so its mean is the rate of failures.

    Args:
        decode: token ids of a row (padding taken out) -> text.
        records: (source, record) -> the record that the prompt was made of.
        timeout: seconds, per call.
        workers: threads. Work that holds Python's lock gains nothing from more.

    Raises:
        RuntimeError: at score, from a failed call, when `on_error` is None.
    """

    def judge(state, batch: HostBatch):
        rollouts = batch.rollouts
        rows = batch.rows(decode)
        # Looked up here, on one thread: data sources need not be safe for more.
        known = {at: records(*at) for at in {(row.source, row.record) for row in rows.values()}}

        def bind(row):
            return lambda: fn(row.prompt, row.completion, known[row.source, row.record])

        order = list(rows)
        calls = [bind(rows[index]) for index in order]
        values, failures = {}, dict.fromkeys(order, 0.0)
        for at, result in run_all(calls, timeout=timeout, workers=workers):
            index = order[at]
            if isinstance(result, float) and math.isfinite(result):
                values[index] = result
                continue
            if on_error is None:
                raise _failure(name, rows[index], result)
            values[index], failures[index] = float(on_error), 1.0
        outcome = spread(values, rollouts.truncated)
        parts = {name: outcome}
        if on_error is not None:
            parts[f"{name}/failures"] = spread(failures, rollouts.truncated)
        return Scores(outcome=outcome, process=zeros(rollouts.logprobs), parts=parts), state

    return Reward(name=name, where="host", init=dict, score=HostScore(judge))


def _failure(name, row, result) -> RuntimeError:
    what = repr(result) if isinstance(result, BaseException) else f"it returned {result}"
    error = RuntimeError(
        f"reward {name!r} failed on source {row.source}, record {row.record}: {what}; "
        "set on_error=<value> to score that value and count the failure"
    )
    error.__cause__ = result if isinstance(result, BaseException) else None
    return error
