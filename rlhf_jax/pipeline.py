"""Several stages from one config: fine-tuning, labels, reward models, policy, evaluation.

    python -m rlhf_jax.pipeline --config=configs/quickstart.py --workdir=DIR

Each stage is a program with a config of its own and the folder DIR/<stage>. In a stage's config
the text ``{workdir}`` stands for DIR, so a stage can start from an earlier one. A stage that has
its summary.json is done and is not run again; one that was stopped resumes.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from rlhf_jax import program, run_folder
from rlhf_jax.evaluate import evaluate
from rlhf_jax.label_samples import label_samples
from rlhf_jax.train_policy import train_policy
from rlhf_jax.train_reward import train_reward
from rlhf_jax.train_sft import train_sft
from rlhf_jax.training.writer import write_json

_log = logging.getLogger("rlhf_jax.pipeline")  # __name__ is "__main__" when it is run
PROGRAMS: Mapping[str, Callable[[ConfigDict, str], Any]] = {
    "train_sft": train_sft,
    "label_samples": label_samples,
    "train_reward": train_reward,
    "train_policy": train_policy,
    "evaluate": evaluate,
}


def place(values: Any, workdir: str) -> Any:
    """``values`` with ``{workdir}`` replaced in every text."""
    if isinstance(values, Mapping):
        return {name: place(value, workdir) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(place(value, workdir) for value in values)
    return values.replace("{workdir}", workdir) if isinstance(values, str) else values


def check(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """The stages in their order.

    Raises:
        ValueError: for an empty list, a name twice, or an unknown program.
    """
    names = list(config.order)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"order={names}; name every stage to run, once")
    for name in names:
        if name not in config.stages:
            raise ValueError(f"order names {name!r}; stages has {', '.join(config.stages)}")
        known = config.stages[name].program
        if known not in PROGRAMS:
            raise ValueError(
                f"stages.{name}.program={known!r}; known: {', '.join(sorted(PROGRAMS))}"
            )
    return [(name, config.stages[name]) for name in names]


def pipeline(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Runs the stages of ``config.order`` that are not done; returns the last one's summary.

    Raises:
        ValueError: for bad input.
    """
    stages = check(config)
    folder = run_folder.prepare(workdir, config, {})
    started = time.time()
    summary, seconds = {}, {}
    for name, stage in stages:
        done = folder / name / "summary.json"
        if run_folder.agreed(done.exists()):
            _log.info("stage %s: done before, in %s", name, done.parent)
        else:
            _log.info("stage %s: %s", name, stage.program)
            own = ConfigDict(place(stage.config.to_dict(), str(folder)))
            PROGRAMS[stage.program](own, str(folder / name))
            run_folder.barrier(f"stage {name}")
        summary = json.loads(done.read_text())
        seconds[f"seconds/{name}"] = summary["seconds"]
    if jax.process_index() == 0:
        # What an earlier session did counts too.
        total = {"seconds": round(sum(seconds.values()), 1)}
        facts = run_folder.closing_facts(started) | total
        write_json(folder / "summary.json", summary | seconds | facts)
    return summary


if __name__ == "__main__":
    program.run_program(pipeline)
