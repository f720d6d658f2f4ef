"""Workload C: a PPO step with a learned reward and a value model, as `train_policy` makes it.

    python benchmarks/workload_c.py [--workdir=FOLDER] [--reps=5] [--threads=1]

Rollouts, scores, log-probs of the policy and of the reference, values, one update of policy and
value model; see `benchmarks.workloads`.
"""

import pathlib
import sys
from typing import Any

if not __package__:  # started by its path: this is a part of the project that lies above it
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from ml_collections import ConfigDict

from benchmarks import workloads
from benchmarks.workload_a import write_prompts
from benchmarks.workload_b import policy_config, run_policy
from benchmarks.workloads import KL_COEF, LEARNING_RATE, Clock, Options


def config(options: Options, folder: pathlib.Path, prompts: pathlib.Path) -> ConfigDict:
    """The config of the run."""
    outcome = dict(
        name="outcome_model", weight=1.0, init_from=str(folder / "reward"), head="outcome"
    )
    rate = dict(learning_rate=LEARNING_RATE)
    return policy_config(
        options,
        "C",
        folder,
        prompts,
        value=dict(init_from=str(folder / "value")),
        rewards=dict(outcome=outcome),
        algorithm=dict(name="ppo", gamma=1.0, lam=0.95, kl_coef=KL_COEF),
        optimizer=dict(policy=rate, value=rate),
    )


def run(
    clock: Clock, options: Options, folder: pathlib.Path, scratch: pathlib.Path
) -> tuple[int, dict[str, Any]]:
    """Tokens sampled in a step, and what else there is to say."""
    prompts = scratch / "prompts.jsonl"
    count = min(options.steps * options.size("C").prompts, 512)  # then from the start again
    write_prompts(folder, prompts, count)
    return run_policy(clock, options, "C", config(options, folder, prompts))


if __name__ == "__main__":
    workloads.main("C")
