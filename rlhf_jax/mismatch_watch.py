"""The watch of a policy run: measures, raises alarms, and may freeze the learning rate.

It never stops a run. Its state lies in ``RunState.controllers["mismatch"]``, as float32 arrays on
the host; what is computed from them is float64. So a run that is stopped and started again raises
the alarms that it would have raised.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.mesh import fetch_host, replicate
from rlhf_jax.mismatch_plan import Watch, plain
from rlhf_jax.ops.length_bias import length_gain, within_prompt_correlations
from rlhf_jax.ops.metrics import value
from rlhf_jax.ops.mismatch import (
    ALARMS,
    Course,
    alarms,
    diverged,
    relative_divergence,
    window_correlations,
    within_prompt_accuracy,
    zscores,
)
from rlhf_jax.policy_run import PolicyRun
from rlhf_jax.rewards.host import Decode, HostBatch, spread
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.types import Metrics, Rollouts, RunState, Scores

KEY = "mismatch"
_BUCKET = 20  # tokens, of NRG
# What a human should look at, by alarm.
LOOK = {
    "divergence": "read samples that the proxy likes and its twin does not (samples.jsonl)",
    "gold": "read the newest samples: the reward rises where gold falls",
    "kl": "read samples for text that the start would not write; raise the KL coefficient",
    "length": "see whether longer completions are better, or only longer",
    "refusals": "read the completions that refuse, and their prompts",
    "diverged": "lower the learning rate or raise the KL coefficient",
}

_log = logging.getLogger(__name__)


def attach(run: PolicyRun, state: RunState) -> RunState:
    """``state`` with room for what the watch keeps; as it was where nothing is watched."""
    watch, sizes = run.plan.watch, run.plan.sizes
    if watch is None:
        return state
    completions = watch.start * sizes.prompts * sizes.samples
    kept = max(watch.thresholds.window, watch.thresholds.in_a_row)
    own = {
        "start": _blank(completions),
        "steps": _blank(watch.every),
        "recent": _blank(kept),
        "first": {name: np.asarray(-1, np.int32) for name in ALARMS},  # step; -1: not yet
    }
    return dataclasses.replace(state, controllers={**state.controllers, KEY: own})


def _blank(count: int) -> dict[str, np.ndarray]:
    return {name: np.full(count, math.nan, np.float32) for name in Course._fields}


def measure_start(run: PolicyRun, state: RunState, score: Callable[[Rollouts], Scores]) -> RunState:
    """``state`` with what the initial policy's completions are: the start of every comparison.

    Args:
        score: what all rewards say of rollouts, by the state that they have now.
    """
    watch, sizes = run.plan.watch, run.plan.sizes
    if watch is None:
        return state
    rows: dict[str, list[np.ndarray]] = {name: [] for name in Course._fields}
    for batch in range(watch.start):
        # Step 0 of this purpose belongs to the rewards' own statistics.
        key = step_key(run.plan.config.seed, Purpose.CALIBRATE, 1 + batch)
        rollouts = run.sample(state, batch * sizes.prompts, key)
        parts, lengths = _rows(watch, rollouts, score(rollouts))
        refused = _refused(watch, run.plan.tokenizer.decode, rollouts)
        seen = {**parts, "kl": np.zeros(len(lengths)), "length": lengths, "refusals": refused}
        for name in rows:
            rows[name].append(np.asarray(seen[name], np.float32))
    start = {name: np.concatenate(found) for name, found in rows.items()}
    return _replaced(state, {**state.controllers[KEY], "start": start})


def watch_step(
    run: PolicyRun,
    state: RunState,
    step: int,
    rollouts: Rollouts,
    scores: Scores,
    metrics: Metrics,
) -> tuple[RunState, dict[str, float]]:
    """Takes what a step of training measured; every ``every`` steps of the policy, evaluates.

    Where the critic alone trains nothing is watched: what moves then is chance.

    Returns:
        the state, and the numbers of the evaluation (nothing between evaluations).
    """
    watch, made = run.plan.watch, step - run.plan.pretraining.steps
    if watch is None or made < 0:
        return state, {}
    own = jax.tree.map(np.array, state.controllers[KEY])  # copies: states do not change
    for name, number in _means(watch, metrics).items():
        own["steps"][name][made % watch.every] = number
    if (made + 1) % watch.every:
        return _replaced(state, own), {}
    refused = _refused(watch, run.plan.tokenizer.decode, rollouts)
    for name in Course._fields:
        last = refused if name == "refusals" else own["steps"][name].astype(np.float64)
        own["recent"][name] = np.append(own["recent"][name][1:], np.float32(np.mean(last)))
    recent, start = Course(**own["recent"]), Course(**own["start"])
    numbers = evaluation(watch, recent, start)
    numbers |= _batch_numbers(watch, start, rollouts, scores)
    raised = alarms(recent, start, watch.thresholds)
    fired = [name for name in ALARMS if raised[name][-1]]
    numbers |= {f"monitor/alarm/{name}": float(name in fired) for name in ALARMS}
    for name in fired:
        if own["first"][name] < 0:
            own["first"][name] = np.asarray(step, np.int32)
            _warn(watch, name, step, numbers)
    state = _replaced(state, own)
    frozen = watch.freeze and max(own["first"].values()) >= 0
    if frozen:
        scale = replicate(np.float32(0), run.plan.mesh)  # laid out as it was: no second compile
        state = dataclasses.replace(state, train=dataclasses.replace(state.train, lr_scale=scale))
    return state, numbers | {"monitor/lr_scale": float(not frozen)}


def evaluation(watch: Watch, recent: Course, start: Course) -> dict[str, float]:
    """What the newest evaluation says beside the start, by the name of its metric; see
    docs/reference.md."""
    proxy, held_out, gold = (
        zscores(getattr(recent, name), getattr(start, name))
        for name in ("proxy", "held_out", "gold")
    )
    t = watch.thresholds
    below = diverged(recent.proxy, float(np.mean(start.proxy)), recent.kl, t.kl_target)
    found = {
        **{f"monitor/{name}": column for name, column in recent._asdict().items()},
        "monitor/z_proxy": proxy,
        "monitor/z_held_out": held_out,
        "monitor/z_gold": gold,
        "monitor/divergence": relative_divergence(proxy, held_out),
        "monitor/corr_reward_gold": window_correlations(recent.proxy, recent.gold, window=t.window),
        "monitor/diverged": below,
    }
    return {name: float(column[-1]) for name, column in found.items()}


def _batch_numbers(
    watch: Watch, start: Course, rollouts: Rollouts, scores: Scores
) -> dict[str, float]:
    """What only whole completions tell: of the newest batch."""
    parts, lengths = _rows(watch, rollouts, scores)
    k = rollouts.group_size
    by_prompt = {name: column.reshape(-1, k) for name, column in parts.items()}
    judge = by_prompt["gold" if watch.gold else "held_out"]
    alike = within_prompt_correlations(list(lengths.reshape(-1, k)), list(by_prompt["proxy"]))
    known = alike[~np.isnan(alike)]
    # NRG compares completions of equal length, of which there may be none any more.
    met = np.intersect1d(lengths // _BUCKET, start.length // _BUCKET)
    now = (lengths, parts["proxy"])
    gain = length_gain(start.length, start.proxy, *now, width=_BUCKET) if len(met) else None
    return {
        "monitor/accuracy": within_prompt_accuracy(by_prompt["proxy"], judge),
        "monitor/corr_length_reward": float(known.mean()) if len(known) else math.nan,
        "monitor/nrg": gain.within if gain else math.nan,
        "monitor/nrg_ratio": gain.ratio if gain else math.nan,
    }


def _means(watch: Watch, metrics: Metrics) -> dict[str, float]:
    """A step's means; what is not among its metrics is left out."""
    columns = {
        "proxy": f"reward/{watch.proxy}",
        "held_out": f"reward/{watch.held_out}",
        "gold": f"reward/{watch.gold}",
        "kl": "objective/kl_ref",
        "length": "rollout/length",
    }
    found = fetch_host({name: metrics[c] for name, c in columns.items() if c in metrics})
    return {name: float(value(mean)) for name, mean in found.items()}


def _rows(
    watch: Watch, rollouts: Rollouts, scores: Scores
) -> tuple[dict[str, Float[np.ndarray, " B"]], Float[np.ndarray, " B"]]:
    """Scores by role (NaN where no reward has it) and lengths of all rollouts, on the host."""
    labels = dict(proxy=watch.proxy, held_out=watch.held_out, gold=watch.gold)
    wanted = {role: scores.parts[label] for role, label in labels.items() if label}
    found, mask = fetch_host((wanted, rollouts.mask))
    none = np.full(len(mask), math.nan)
    parts = {role: found[role].astype(np.float64) if role in found else none for role in labels}
    return parts, mask.sum(-1).astype(np.float64)


def _refused(watch: Watch, decode: Decode, rollouts: Rollouts) -> Float[np.ndarray, " B"]:
    """1 for completions that hold one of the texts of a refusal, else 0."""
    rows = HostBatch(rollouts).rows(decode)
    texts = {index: plain(row.completion) for index, row in rows.items()}
    refused = {i: float(any(p in text for p in watch.refusals)) for i, text in texts.items()}
    return fetch_host(spread(refused, rollouts.truncated)).astype(np.float64)


def _replaced(state: RunState, own: Mapping[str, Any]) -> RunState:
    return dataclasses.replace(state, controllers={**state.controllers, KEY: own})


def _warn(watch: Watch, name: str, step: int, numbers: Mapping[str, float]) -> None:
    """One line on stderr: which alarm, its numbers, the step, and where to look."""
    t, said = watch.thresholds, functools.partial(_said, numbers)
    facts = {
        "divergence": f"{said('z_proxy', 'z_held_out', 'divergence')}, above {t.divergence} in "
        f"{t.in_a_row} evaluations in a row",
        "gold": f"{said('corr_reward_gold', 'z_proxy', 'z_gold')} over {t.window} evaluations",
        "kl": f"{said('kl')}, kl_max={t.kl_max}",
        "length": f"{said('length')}, more than {t.length} times that of the start",
        "refusals": f"{said('refusals')}, more than {t.refusals} times those of the start",
        "diverged": f"{said('z_proxy', 'kl')}, kl_target={t.kl_target}",
    }
    then = "the learning rate is 0 from here on" if watch.freeze else "the run goes on"
    _log.warning("step %d: alarm %s: %s; %s; %s", step, name, facts[name], LOOK[name], then)


def _said(numbers: Mapping[str, float], *names: str) -> str:
    return ", ".join(f"{name} {numbers[f'monitor/{name}']:.3g}" for name in names)
