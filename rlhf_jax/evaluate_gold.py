"""Evaluates policies by a reward that was not trained on: what their samples are really worth.

    python -m rlhf_jax.evaluate_gold --config=configs/X.py --workdir=DIR

K samples of each of M held-out prompts for every policy of ``policies``, scored by the reward of
``gold``, which needs no model. Beside the means stand what each policy gained over
``reference`` on the same prompts and how far it went from it, all with 95 % intervals over
prompts, because the samples of one prompt depend on each other. How far it went is the KL in nats
per completion; it is left out where ``rollout.sampling`` is not as the policy itself draws
(temperature 1, nothing truncated), because such samples do not measure it. Every completion goes
to evaluation.jsonl; a table is printed.
"""

import time
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from rlhf_jax import build, program, run_folder
from rlhf_jax.evaluate import conclude
from rlhf_jax.judge import Found, check_judge, judged, make_judge
from rlhf_jax.label_samples import write_lines
from rlhf_jax.ops.reward_metrics import mean_interval
from rlhf_jax.policy_sampler import PolicySampler, check_problems, of_policy
from rlhf_jax.training.keys import Purpose


def numbers_of(found: Mapping[str, Found], reference: str) -> dict[str, float]:
    """<stage>/gold, /length, and against the reference /gold_gain and /kl, with intervals."""
    numbers: dict[str, float] = {}

    def add(name: str, values: Float[np.ndarray, "M K"]) -> None:
        mean, low, high = mean_interval(values.mean(axis=1))
        numbers.update({name: mean, f"{name}_low": low, f"{name}_high": high})

    for stage, one in found.items():
        add(f"{stage}/gold", one.gold)
        if stage != reference:
            add(f"{stage}/gold_gain", one.gold - found[reference].gold)
            if one.kl is not None:
                add(f"{stage}/kl", one.kl)
        add(f"{stage}/length", one.length)
    return numbers


def check_config(config: ConfigDict) -> None:
    """Raises a ValueError for what cannot be evaluated; opens nothing."""
    if config.reference not in config.policies:
        raise ValueError(
            f"reference={config.reference!r}; wanted one of policies: {', '.join(config.policies)}"
        )
    if config.problems < 2:
        raise ValueError(f"problems={config.problems}; wanted 2 or more, for an interval")
    check_judge("gold", config.gold)


def evaluate_gold(config: ConfigDict, workdir: str) -> dict[str, float | int]:
    """Evaluates what ``config.policies`` name; returns the numbers.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    started = time.time()
    check_config(config)
    samplers = {
        stage: PolicySampler(of_policy(config, stage), Purpose.EVALUATE, f"policies.{stage}")
        for stage in config.policies
    }
    reference = samplers[config.reference]
    check_problems("problems", config.problems, reference)
    judge = make_judge("gold", config.gold, reference)
    sampling = build.sampling(config.rollout.sampling)
    plain = sampling.temperature == 1 and not sampling.truncates
    folder = run_folder.prepare(workdir, config, {})
    found = {
        stage: judged(stage, sampler, reference if plain else None, judge, config.problems)
        for stage, sampler in samplers.items()
    }
    write_lines(folder / "evaluation.jsonl", [row for one in found.values() for row in one.rows])
    numbers = numbers_of(found, config.reference)
    compiles = sum(sampler.compiles.after_warmup for sampler in samplers.values())
    return conclude(folder, numbers, compiles, started)


if __name__ == "__main__":
    program.run_program(evaluate_gold)
