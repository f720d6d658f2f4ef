"""Reinforcement learning from learned, verifiable and shaping rewards: the loop.

    python -m rlhf_jax.train_policy --config=configs/ppo_tiny.py --workdir=DIR

Four compiled steps an iteration: generate, score, evaluate, update. A batch that is trained on once
and whole is evaluated by its update, but for the reference. Host verifiers run while
`score` and `evaluate` are in flight. The checkpoint is the `RunState`; a run that is stopped and
started again repeats, bit for bit, what it would have done.
"""

import functools
import time
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from rlhf_jax import base_files, controls, mismatch_page, policy_run, program, run_folder
from rlhf_jax.k_axis import axis_metrics
from rlhf_jax.mismatch_watch import attach, measure_start, watch_step
from rlhf_jax.ops.metrics import add
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.policy_run import PolicyRun
from rlhf_jax.rewards.base import add_scores, lend_base
from rlhf_jax.run_log import RunLog, policy_samples
from rlhf_jax.training.experience import make_experience
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.training.selection import draw_metrics
from rlhf_jax.types import Experience, Metrics, Params, Rollouts, RunState, Scores


class Iteration(NamedTuple):
    """What one iteration leaves for the logs; metrics are still on the devices."""

    rollouts: Rollouts
    scores: Scores
    metrics: Metrics


def score_host(
    run: PolicyRun, rewards: dict, base: Params, rollouts: Rollouts
) -> tuple[Scores | None, dict]:
    """Scores of the host rewards, None where there are none; and all reward states."""
    if "host" not in run.rewards:
        return None, rewards
    lent = lend_base(rewards["host"], base)
    scores, host = run.rewards["host"].score(lent, rollouts)
    return scores, {**rewards, "host": lend_base(host, {})}


def score_device(
    run: PolicyRun, rewards: dict, base: Params, rollouts: Rollouts
) -> tuple[Scores | None, dict]:
    """Scores of the device rewards, dispatched but not awaited; and all reward states.

    Args:
        base: what lies under the adapters of rewards that share the policy's.
    """
    if "device" not in run.rewards:
        return None, rewards
    lent = lend_base(rewards["device"], base)
    scores, device = run.steps.score(lent, rollouts)
    return scores, {**rewards, "device": lend_base(device, {})}


def join_scores(device: Scores | None, host: Scores | None) -> Scores:
    """The sum over places."""
    if device is None or host is None:
        return host if device is None else device
    return add_scores(device, host)


def score_all(run: PolicyRun, state: RunState, rollouts: Rollouts) -> Scores:
    """What all rewards say by the states that they have; nothing of it is kept."""
    device, _ = score_device(run, state.rewards, state.reference, rollouts)
    host, _ = score_host(run, state.rewards, state.reference, rollouts)
    return join_scores(device, host)


def collect(
    run: PolicyRun, state: RunState, step: int
) -> tuple[Rollouts, Scores, RunState, Metrics]:
    """Draws until every group carries signal, at most ``max_draws`` times (dynamic sampling)."""
    sizes, seed = run.plan.sizes, run.plan.config.seed
    position, rewards = int(state.data_position["prompts"]), state.rewards
    metrics: Metrics = {}
    kept = signal = None
    for attempt in range(sizes.max_draws):
        key = step_key(seed, Purpose.SAMPLE, step * sizes.max_draws + attempt)
        rollouts = run.sample(state, position, key)
        device, rewards = score_device(run, rewards, state.reference, rollouts)
        host, rewards = score_host(run, rewards, state.reference, rollouts)
        batch = (rollouts, join_scores(device, host))
        position += sizes.prompts
        fresh, found = run.steps.select(batch[1])
        metrics = add(metrics, found)
        if kept is None:
            kept, signal = batch, fresh
        else:
            kept, signal = run.steps.refill(kept, signal, batch, fresh)
        if bool(signal.all()):
            break
    metrics = metrics | draw_metrics(signal, attempt + 1)
    return *kept, run.advance(state, rewards=rewards, position=position), metrics


def iterate(run: PolicyRun, state: RunState, step: int) -> tuple[RunState, Iteration]:
    """One iteration of the data's way: prompts, rollouts, scores, experience, update."""
    sizes, seed, frozen = run.plan.sizes, run.plan.config.seed, run.frozen(state)
    drawn: Metrics = {}
    if run.steps.select is None:
        position = int(state.data_position["prompts"])
        key = step_key(seed, Purpose.SAMPLE, step * sizes.max_draws)
        rollouts = run.sample(state, position, key)
        device, rewards = score_device(run, state.rewards, state.reference, rollouts)
        outputs = run.steps.evaluate(state.train.params, frozen, rollouts)
        host, rewards = score_host(
            run, rewards, state.reference, rollouts
        )  # overlaps with the two above
        scores = join_scores(device, host)
        state = run.advance(state, rewards=rewards, position=position + sizes.prompts)
    else:
        rollouts, scores, state, drawn = collect(run, state, step)
        outputs = run.steps.evaluate(state.train.params, frozen, rollouts)
    extra = run.fetch_extra(state)
    kl_coef = state.controllers.get(controls.KL_COEF)  # None: the algorithm's own
    experience = make_experience(rollouts, scores, *outputs, extra, kl_coef)
    metrics = drawn
    if run.steps.monitor is not None:
        found = run.steps.monitor(experience, outputs[0].entropy, state.train.step)
        metrics = add(metrics, found)
    metrics = add(metrics, axis_metrics(run.plan.config.rollout, sizes.prompts, sizes.lr_factor))
    state, learnt = learn(run, state, step, experience)
    metrics = add(metrics, learnt)
    if step >= run.plan.pretraining.steps:
        state, driven = run.control(state, step, metrics)
        metrics = add(metrics, driven)
    return state, Iteration(rollouts, scores, metrics)


def learn(
    run: PolicyRun, state: RunState, step: int, experience: Experience
) -> tuple[RunState, Metrics]:
    """What one batch changes: policy, critic and online rewards; before that the critic alone."""
    seed, frozen = run.plan.config.seed, run.frozen(state)
    key = step_key(seed, Purpose.UPDATE, step)
    if step < run.plan.pretraining.steps:  # rows of `extra` wait for the policy
        train, metrics = run.steps.update_critic(state.train, frozen, experience, key)
        return run.advance(state, train=train), metrics
    train, metrics = run.steps.update(state.train, frozen, experience, key)
    state = run.advance(state, train=train, extra=True)
    if run.steps.update_rewards is not None:
        key = step_key(seed, Purpose.REWARD_UPDATE, step)
        device, found = run.steps.update_rewards(
            state.rewards["device"], state.reference, experience.rollouts, experience.scores, key
        )
        state = run.advance(state, rewards={**state.rewards, "device": device})
        metrics = add(metrics, found)
    return state, metrics


def train_policy(config: ConfigDict, workdir: str) -> RunState:
    """Trains the policy that ``config`` describes; resumes if ``workdir`` has a checkpoint.

    Raises:
        ValueError: for bad input, before any device is touched.
        FloatingPointError: after ``train.max_skipped`` non-finite updates in a row.
    """
    started = time.time()
    plan = make_plan(config)
    folder = run_folder.prepare(workdir, config, plan.described)
    base_files.keep(folder, config)
    with jax.set_mesh(plan.mesh), RunLog(folder, config) as log:
        run, state = policy_run.start(plan)
        state, first = log.restore(attach(run, state))
        if first == 0:
            state = measure_start(run, state, functools.partial(score_all, run, state))
        for step in log.steps(first, plan.pretraining.steps):
            state, iteration = iterate(run, state, step)
            state, seen = watch_step(run, state, step, *iteration)
            log.metrics(step, iteration.metrics, seen)
            if step % config.log.samples_every == 0:
                samples = policy_samples(plan, iteration.rollouts, iteration.scores)
                log.samples(step, samples)
            if log.checkpoint(step + 1, state):
                mismatch_page.write(folder, plan, state)
        log.finish(config.train.steps, state, started)
        mismatch_page.write(folder, plan, state)
    return state


if __name__ == "__main__":
    program.run_program(train_policy)
