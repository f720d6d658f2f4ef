"""Several stages from one config: fine-tuning, labels, reward models, policy, evaluation.

    python -m rlhf_jax.pipeline --config=configs/quickstart.py --workdir=DIR

Each stage is a program with a config of its own and the folder DIR/<stage>. In a stage's config
the text ``{workdir}`` stands for DIR, so a stage can start from an earlier one. A stage that has
its summary.json is done and is not run again; one that was stopped resumes.
"""

import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from rlhf_jax import card, program, run_folder, sections
from rlhf_jax.evaluate import evaluate, print_table
from rlhf_jax.evaluate_gold import evaluate_gold
from rlhf_jax.evaluate_reward import evaluate_reward
from rlhf_jax.label_samples import label_samples
from rlhf_jax.label_steps import label_steps
from rlhf_jax.rehearse import place, rehearse
from rlhf_jax.report import report
from rlhf_jax.select_rehearsal import select_rehearsal
from rlhf_jax.train_dpo import train_dpo
from rlhf_jax.train_policy import train_policy
from rlhf_jax.train_reward import train_reward
from rlhf_jax.train_sft import train_sft
from rlhf_jax.training.writer import write_json

_log = logging.getLogger("rlhf_jax.pipeline")  # __name__ is "__main__" when it is run
PROGRAMS: Mapping[str, Callable[[ConfigDict, str], Any]] = {
    "train_sft": train_sft,
    "train_dpo": train_dpo,
    "label_samples": label_samples,
    "label_steps": label_steps,
    "select_rehearsal": select_rehearsal,
    "train_reward": train_reward,
    "train_policy": train_policy,
    "evaluate": evaluate,
    "evaluate_gold": evaluate_gold,
    "evaluate_reward": evaluate_reward,
}


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


def finished(folder: pathlib.Path, stages: Sequence[tuple[str, ConfigDict]]) -> list[str]:
    """The stages that are done: summary.json is there and says as many steps as the config.

    Raises:
        ValueError: where a stage that others were made from was made longer.
    """
    done = []
    for number, (name, stage) in enumerate(stages):
        path = folder / name / "summary.json"
        if not path.is_file():
            continue
        wanted = stage.config.get("train", {}).get("steps", 0)
        took = run_folder.read_json(path).get("steps", wanted)
        later = [other for other, _ in stages[number + 1 :] if (folder / other).exists()]
        if wanted > took and later:
            raise ValueError(
                f"stages.{name}.config.train.steps={wanted} but the stage ended after {took}, and "
                f"{', '.join(later)} came after it; move away what they left in {folder} to run "
                "them again, or use a new workdir"
            )
        if wanted <= took:
            done.append(name)
    return done


def pipeline(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Runs the stages of ``config.order`` that are not done; returns the last one's summary.

    Raises:
        ValueError: for bad input.
    """
    started = time.time()
    sections.check("pipeline", config)
    stages = check(config)
    run_folder.check_workdir(workdir, config)
    done = finished(pathlib.Path(workdir), stages)
    rehearse(stages, workdir, done)
    folder = run_folder.prepare(workdir, config, {})
    checked = round(time.time() - started, 1)  # with the making of data that is generated
    summaries: dict[str, dict[str, Any]] = {}
    for name, stage in stages:
        skipped = run_folder.agreed(name in done)
        if skipped:
            _log.info("stage %s: done before, in %s", name, folder / name)
        else:
            _log.info("stage %s: %s", name, stage.program)
            own = ConfigDict(place(stage.config.to_dict(), str(folder)))
            PROGRAMS[stage.program](own, str(folder / name))
            run_folder.barrier(f"stage {name}")
        summaries[name] = run_folder.read_json(folder / name / "summary.json")
        if skipped and stage.program.startswith("evaluate") and jax.process_index() == 0:
            print_table(run_folder.results(summaries[name]))
    if jax.process_index() == 0:
        add_to_cards(folder, stages)
        facts = run_folder.closing_facts(started)
        write_json(folder / "summary.json", summarise(summaries, facts, checked))
        picture = report(folder, dict(stages))
        if picture is not None:
            _log.info("drew %s", picture)
    return summaries[stages[-1][0]]


def add_to_cards(folder: pathlib.Path, stages: Sequence[tuple[str, ConfigDict]]) -> None:
    """Adds what evaluations found of a reward model that a stage trained to that model's card."""
    trained = [name for name, stage in stages if stage.program == "train_reward"]
    for name, stage in stages:
        if stage.program not in ("evaluate", "evaluate_reward"):
            continue
        section = stage.config.get("reward", {})
        for model in trained:
            if section.get("init_from", "") == f"{{workdir}}/{model}":
                found = card.reported(folder / name)
                if found:
                    card.add_report(folder / model, name, found)


def summarise(
    summaries: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any], checked: float
) -> dict[str, Any]:
    """The last stage's results with what all stages took; earlier sessions' stages count too.

    ``seconds`` is the sum over stages and what was ``checked`` before the first one,
    ``peak_memory_bytes`` the most that any needed, and
    ``compiles_after_warmup`` counts programs compiled behind the second iteration of any loop.
    """
    every = list(summaries.values())
    return {
        **every[-1],
        **facts,
        **{f"seconds/{name}": stage["seconds"] for name, stage in summaries.items()},
        "seconds/checks": checked,
        "seconds": round(checked + sum(stage["seconds"] for stage in every), 1),
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in every),
        "compiles_after_warmup": sum(stage["compiles_after_warmup"] for stage in every),
    }


if __name__ == "__main__":
    program.run_program(pipeline)
