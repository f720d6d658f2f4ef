"""Workload D: a step of a reward model on pairs, as `train_reward` makes it.

    python benchmarks/workload_d.py [--workdir=FOLDER] [--reps=5] [--threads=1]

Data, state and the compiled step are those of the program; see `benchmarks.workloads`.
"""

import json
import pathlib
import sys
from typing import Any

if not __package__:  # started by its path: this is a part of the project that lies above it
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import jax
from ml_collections import ConfigDict

from benchmarks import decode, update, workloads
from benchmarks.workloads import LAYER_CHUNK, MESH, Clock, Options
from rlhf_jax import fit, host_memory, train_reward
from rlhf_jax.ops.metrics import values
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.training.supervised import make_supervised_step
from rlhf_jax.training.update import compile_update


def write_pairs(folder: pathlib.Path, path: pathlib.Path, count: int) -> None:
    """The first ``count`` pairs as a file of records: texts without prompt or end-of-text."""
    pairs = json.loads((folder / "pairs.json").read_text())[:count]
    whole = {"prompt": "", "chosen_truncated": True, "rejected_truncated": True}
    records = [
        whole | {side: pair[side]["text"] for side in ("chosen", "rejected")} for pair in pairs
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def config(options: Options, folder: pathlib.Path, pairs: pathlib.Path) -> ConfigDict:
    """The config of the run."""
    size = options.size("D")
    source = dict(
        kind="pairs",
        name=f"jsonl:{pairs}",
        split="all",
        template="{prompt}",
        max_length=size.prompt,
        overlong="error",
        weight=1.0,
        rows=size.prompts,
    )
    origin = dict(
        origin="texts of a benchmark",
        annotators="no people: sides at random",
        aggregation="one label a pair",
        licence="unknown",
    )
    return ConfigDict(
        dict(
            seed=0,
            card=dict(sources=dict(pairs=origin), licence="unknown", limits=("it says nothing",)),
            mesh=MESH,
            model=dict(init_from=str(folder / "reward"), remat="products", layer_chunk=LAYER_CHUNK),
            reward=dict(score_heads=("outcome",)),
            data=dict(tokenizer=str(folder / "reward")),
            sources=dict(pairs=source),
            optimizer=dict(learning_rate=workloads.LEARNING_RATE),
            updates=dict(microbatches=1),
            train=dict(steps=options.steps, max_skipped=1),
            eval=dict(every=options.steps, sources=dict()),
            checkpoint=dict(every=options.steps, keep=1),
            log=dict(every=1, samples_every=options.steps, samples=0),
        )
    )


def run(
    clock: Clock, options: Options, folder: pathlib.Path, scratch: pathlib.Path
) -> tuple[int, dict[str, Any]]:
    """Trained tokens in a step, and what else there is to say."""
    size = options.size("D")
    write_pairs(folder, scratch / "pairs.jsonl", options.steps * size.prompts)
    made = fit.open_sources(train_reward.check(config(options, folder, scratch / "pairs.jsonl")))
    sections = made.config.sources
    with jax.set_mesh(made.mesh):
        state = fit.create(made)
        step = make_supervised_step(
            made.model, {"pairs": 1.0}, made.optimizer, role=made.role, microbatches=1
        )
        train, frozen = state.train, {made.role: state.reference}
        move = compile_update(step, train, made.mesh, exact=False)
        del state
        clock.ready()
        losses = []
        for index in host_memory.loop(range(options.steps)):
            position = {"pairs": index * size.prompts}
            mixture = fit.fetch(made, made.sources, sections, position)
            train, metrics = move(train, frozen, mixture, step_key(0, Purpose.UPDATE, index))
            losses.append(float(values(jax.device_get(metrics))["loss/pairs"]))
            jax.block_until_ready(train)
            clock.tick()
    if int(train.skipped):
        raise RuntimeError("an update was skipped: its loss or gradient is not finite")
    texts = size.prompts * size.samples
    flops = update.useful_flops(made.described, decode.Shape(texts, 1, 0, size.prompt))
    return texts * size.prompt, {"losses": losses, "useful_flops": flops}


if __name__ == "__main__":
    workloads.main("D")
