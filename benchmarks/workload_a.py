"""Workload A: completions of a batch of prompts, as the programs sample and decode them.

    python benchmarks/workload_a.py [--workdir=FOLDER] [--reps=5] [--threads=1]

From encoded prompts to texts; see `benchmarks.workloads`.
"""

import json
import pathlib
import sys
from typing import Any

if not __package__:  # started by its path: this is a part of the project that lies above it
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import jax
from ml_collections import ConfigDict

from benchmarks import decode, workloads
from benchmarks.workloads import MESH, Clock, Options, Size
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.policy_sampler import PolicySampler, plan_sampler
from rlhf_jax.training.keys import Purpose


def write_prompts(folder: pathlib.Path, path: pathlib.Path, count: int) -> None:
    """The first ``count`` prompts as a file of records."""
    prompts = json.loads((folder / "prompts.json").read_text())[:count]
    path.write_text("".join(json.dumps({"prompt": prompt["text"]}) + "\n" for prompt in prompts))


def data(folder: pathlib.Path, path: pathlib.Path, size: Size) -> dict[str, Any]:
    """The section of prompts, each of exactly as many tokens as there are columns."""
    return dict(
        name=f"jsonl:{path}",
        split="all",
        template="{prompt}",
        max_prompt=size.prompt,
        overlong="error",
        tokenizer=str(folder / "model"),
    )


def rollout(size: Size) -> dict[str, Any]:
    """The section of one batch of completions."""
    return dict(
        prompts=size.prompts,
        samples=size.samples,
        max_tokens=size.completion,
        max_draws=1,
        sampling=dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    )


def check_full(mask: jax.Array, size: Size) -> None:
    """Raises a RuntimeError for completions that ended early: they would cost less."""
    if mask.shape != (size.prompts * size.samples, size.completion) or not bool(mask.all()):
        raise RuntimeError(f"completions of {mask.shape} tokens, not all there; wanted {size}")


def config(options: Options, folder: pathlib.Path, prompts: pathlib.Path) -> ConfigDict:
    """The config of the sampler."""
    size = options.size("A")
    return ConfigDict(
        dict(
            seed=0,
            mesh=MESH,
            model=dict(init_from=str(folder / "model")),
            data=data(folder, prompts, size),
            rollout=rollout(size),
        )
    )


def run(
    clock: Clock, options: Options, folder: pathlib.Path, scratch: pathlib.Path
) -> tuple[int, dict[str, Any]]:
    """Tokens sampled in a step, and what else there is to say."""
    size, prompts = options.size("A"), scratch / "prompts.jsonl"
    write_prompts(folder, prompts, size.prompts)
    described: ModelConfig = plan_sampler(config(options, folder, prompts)).described
    sampler = PolicySampler(config(options, folder, prompts), Purpose.EVALUATE)
    sampler.tables = decode.endless_tables(described.vocab_size)
    total = options.steps * size.prompts
    clock.ready()
    for _, rollouts in sampler.batches(total):
        sampler.decode(rollouts)
        clock.tick()
        check_full(rollouts.mask, size)
    return size.prompts * size.samples * size.completion, {}


if __name__ == "__main__":
    workloads.main("A")
