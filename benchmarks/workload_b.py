"""Workload B: a GRPO step from prompts to the update, as `train_policy` makes it.

    python benchmarks/workload_b.py [--workdir=FOLDER] [--reps=5] [--threads=1]

Rollouts, a reward in Python, log-probs of the policy and of the reference, one update; see
`benchmarks.workloads`.
"""

import pathlib
import sys
from typing import Any

if not __package__:  # started by its path: this is a part of the project that lies above it
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks import decode, workloads
from benchmarks.workload_a import check_full, data, rollout, write_prompts
from benchmarks.workloads import KL_COEF, LAYER_CHUNK, LEARNING_RATE, MESH, Clock, Options
from rlhf_jax import host_memory, policy_run
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.train_policy import iterate


def policy_config(
    options: Options, letter: str, folder: pathlib.Path, prompts: pathlib.Path, **sections: Any
) -> ConfigDict:
    """What the configs of both algorithms have in common."""
    size = options.size(letter)
    return ConfigDict(
        dict(
            seed=0,
            mesh=MESH,
            model=dict(init_from=str(folder / "model"), remat="products", layer_chunk=LAYER_CHUNK),
            data=data(folder, prompts, size),
            extra=dict(),
            rollout=rollout(size),
            updates=dict(epochs=1, minibatches=1, microbatches=1),
            train=dict(steps=options.steps, max_skipped=1),
            checkpoint=dict(every=options.steps, keep=1),
            log=dict(every=1, samples_every=options.steps, samples=0),
            **sections,
        )
    )


def config(options: Options, folder: pathlib.Path, prompts: pathlib.Path) -> ConfigDict:
    """The config of the run."""
    return policy_config(
        options,
        "B",
        folder,
        prompts,
        rewards=dict(share=dict(name="benchmarks.letter_share", weight=1.0)),
        algorithm=dict(name="grpo", kl_coef=KL_COEF),
        optimizer=dict(policy=dict(learning_rate=LEARNING_RATE)),
    )


def run_policy(
    clock: Clock, options: Options, letter: str, made: ConfigDict
) -> tuple[int, dict[str, Any]]:
    """Iterations of a policy run on the clock; tokens sampled in each, and the mean scores."""
    size = options.size(letter)
    plan = make_plan(made)
    plan = plan._replace(tables=decode.endless_tables(plan.described["policy"].vocab_size))
    scores = []
    with jax.set_mesh(plan.mesh):
        run, state = policy_run.start(plan)
        clock.ready()
        for step in host_memory.loop(range(options.steps)):
            state, done = iterate(run, state, step)
            scores.append(float(jnp.mean(done.scores.outcome)))
            jax.block_until_ready((state, jax.device_get(done.metrics)))
            clock.tick()
            check_full(done.rollouts.mask, size)
    if int(state.train.skipped):
        raise RuntimeError("an update was skipped: its loss or gradient is not finite")
    return size.prompts * size.samples * size.completion, {"score_mean": scores}


def run(
    clock: Clock, options: Options, folder: pathlib.Path, scratch: pathlib.Path
) -> tuple[int, dict[str, Any]]:
    """Tokens sampled in a step, and what else there is to say."""
    prompts = scratch / "prompts.jsonl"
    write_prompts(folder, prompts, options.steps * options.size("B").prompts)
    return run_policy(clock, options, "B", config(options, folder, prompts))


if __name__ == "__main__":
    workloads.main("B")
