"""What a loop writes while it runs: metrics, samples, checkpoints; and where it resumes."""

import json
import logging
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import host_memory, run_folder
from rlhf_jax.compile_watch import CompileWatch, compiled
from rlhf_jax.mesh import fetch_host
from rlhf_jax.ops.metrics import value
from rlhf_jax.policy_plan import PolicyPlan
from rlhf_jax.training import checkpoint
from rlhf_jax.training.writer import Writer
from rlhf_jax.types import Metrics, Rollouts, RunState, Scores

_log = logging.getLogger(__name__)
_NONE: Mapping[str, float] = {}
_WATCHED = ("loss/", "update/loss", "policy/grad_norm", "value/grad_norm")


class RunLog:
    """Writer and checkpoints of one run; use it as a context.

    Metrics are fetched one step late, so that the devices never wait for the log.
    """

    def __init__(self, folder: pathlib.Path, config: ConfigDict):
        self._folder = folder
        self._config = config
        self._text = run_folder.config_text(config)
        self._manager = checkpoint.open_manager(
            folder, keep=config.checkpoint.keep, every=config.checkpoint.every
        )
        self._writer: Writer | None = None  # opened by `restore`, which knows where to go on
        self._pending: tuple[int, Metrics, Mapping[str, float], int] | None = None
        self._written = time.perf_counter()
        self._saved = 0
        self._first = 0
        self._compiles = CompileWatch()
        self.last: dict[str, float | None] = {}

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        checkpoint.close(self._manager)
        if self._writer is not None:
            self._writer.close()

    def restore(self, state: RunState) -> tuple[RunState, int]:
        """The newest checkpoint with the shardings of ``state``, or ``state`` itself; its step."""
        step = checkpoint.latest_step(self._manager)
        if step is None:
            self._writer = Writer(self._folder)
            return state, 0
        target = jax.tree.map(_abstract, state)
        # Never two states at a time: a run that fills its devices must be able to resume.
        for leaf in jax.tree.leaves(state):
            if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                leaf.delete()
        restored = checkpoint.restore(self._manager, target, step=step)
        self._writer = Writer(self._folder, resumed=step)
        self._first = self._saved = step
        self.last = last_line(self._folder / "metrics.jsonl", step - 1)
        _log.info("resumed_at %d in %s", step, self._folder)
        return restored, step

    def steps(self, first: int, turn: int = 0) -> Iterator[int]:
        """The steps from ``first`` to the last; what they compile once warm is counted.

        Args:
            turn: a step from which on other programs run than before: they warm up again.
        """
        for steps in (range(first, turn), range(max(first, turn), self._config.train.steps)):
            yield from host_memory.loop(self._compiles.loop(steps))

    def metrics(self, step: int, metrics: Metrics, seen: Mapping[str, float] = _NONE) -> None:
        """Takes the metrics of ``step`` and writes those of the step before.

        Args:
            seen: numbers of the host; a step that has some is written, whatever ``log.every`` says.
        """
        self._write_pending()
        self._pending = (step, metrics, seen, compiled())

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        step, metrics, seen, programs = self._pending
        self._pending = None
        numbers = {name: float(value(mean)) for name, mean in fetch_host(metrics).items()}
        numbers |= seen
        self.last = numbers
        now, steps = time.perf_counter(), self._config.train.steps
        if step % self._config.log.every == 0 or step + 1 == steps or seen:
            own = {"time/step": now - self._written, "time/compiled": float(programs)}
            self._writer.scalars(step, numbers | own)
            shown = self._config.log.get("show", ())
            self._writer.progress(step + 1, steps, {n: numbers[n] for n in shown if n in numbers})
        self._written = now
        self._watch(step, numbers)

    def _watch(self, step: int, numbers: Mapping[str, float]) -> None:
        """Stops a run whose updates, or those of a reward that learns, are not finite any more."""
        if numbers.get("update/skipped", 0.0):
            share = 100 * numbers["update/skipped"]
            _log.warning("step %d: %.0f %% of updates were not finite", step, share)
        limit = self._config.train.max_skipped
        for name, in_row in numbers.items():
            who, _, last = name.rpartition("/")
            own = who == "update" or who.startswith("reward/")
            if not own or last != "skipped_in_row" or in_row < limit:
                continue
            watched, whose = (f"{who}/",), f" of {who}"
            if who == "update":
                watched, whose = _WATCHED, ""
            bad = sorted(n for n, number in numbers.items() if not math.isfinite(number))
            named = [n for n in bad if n.startswith(watched)] or bad
            raise FloatingPointError(
                f"step {step}: {in_row:.0f} updates{whose} in a row were not finite "
                f"(train.max_skipped={limit}); not finite: {', '.join(named) or 'gradients'}; "
                f"last good checkpoint: step {self._saved} in {self._folder / 'checkpoints'}"
            )

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes sampled texts with their scores."""
        self._writer.samples(step, rows)

    def checkpoint(self, step: int, state: RunState, *, force: bool = False) -> bool:
        """Saves ``state`` after ``step`` steps, if one is due; returns whether it was."""
        if not force and step % self._config.checkpoint.every:
            return False
        self._write_pending()  # a resumed run continues the log where this state ends
        with self._compiles.pause():
            if checkpoint.save(self._manager, step, state, self._text, force=True):
                self._saved = step
        return True

    def settle(self, steps: int, state: RunState) -> dict[str, float | None]:
        """Writes the last checkpoint and waits for it; returns the last numbers."""
        self._write_pending()
        self.checkpoint(steps, state, force=True)
        checkpoint.wait(self._manager)
        return self.last

    def finish(self, steps: int, state: RunState, started: float) -> None:
        """The last checkpoint and summary.json."""
        self.settle(steps, state)
        self._writer.summary(
            {
                "steps": steps,
                "resumed_at": self._first,
                "params_sha256": checkpoint.digest(state.train.params),
                **self.last,
                "compiles_after_warmup": self._compiles.after_warmup,
                **run_folder.closing_facts(started),
            }
        )


def last_line(path: pathlib.Path, step: int) -> dict[str, float | None]:
    """The metrics of ``step`` as written (None for NaN); {} if that step was not logged."""
    if not path.exists():
        return {}
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        if row["step"] == step:
            return {
                name: x
                for name, x in row.items()
                if name != "step" and not name.startswith("time/")
            }
    return {}


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding if isinstance(leaf, jax.Array) else None
    )


def policy_samples(plan: PolicyPlan, rollouts: Rollouts, scores: Scores) -> list[dict[str, Any]]:
    """The first ``log.samples`` completions with every part of their scores."""
    count, k = plan.config.log.samples, plan.sizes.samples
    wanted = (rollouts.prompts, rollouts.tokens, rollouts.mask, rollouts.truncated, scores)
    prompts, tokens, mask, truncated, scores = fetch_host(wanted)
    rows = []
    for b in range(min(count, len(tokens))):
        n = b // k
        rows.append(
            {
                "prompt": plan.tokenizer.decode(prompts.tokens[n][prompts.mask[n]].tolist()),
                "completion": plan.tokenizer.decode(tokens[b][mask[b]].tolist()),
                "truncated": bool(truncated[b]),
                "outcome": float(scores.outcome[b]),
                "process": float(np.sum(scores.process[b], where=mask[b])),
                **{f"reward/{name}": float(part[b]) for name, part in scores.parts.items()},
            }
        )
    return rows
