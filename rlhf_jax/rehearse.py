"""The stages of a pipeline, planned before the first one starts: mistakes in the last are seen now.

Each stage is planned as its program would plan it, with a scratch folder in place of the run's. A
stage that trains leaves there what its models will be, and stages that start from it read that.
What is not there yet, parameters and data of earlier stages, is looked at when the stage starts.
"""

import contextlib
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax import (
    evaluate,
    evaluate_benchmarks,
    evaluate_best_of,
    evaluate_gold,
    evaluate_reward,
    fit,
    label_samples,
    label_steps,
    roles,
    run_folder,
    sections,
    select_rehearsal,
    train_dpo,
    train_reward,
    train_sft,
)
from rlhf_jax.data.sources import open_source
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.policy_sampler import check_problems, of_policy, plan_sampler
from rlhf_jax.schema import closest, is_ours, within

Later = Callable[[ConfigDict], bool]  # whether a data section names what an earlier stage writes
_STAGE = re.compile(r"\{workdir\}/([^/]+)")


def place(values: Any, workdir: str) -> Any:
    """``values`` with ``{workdir}`` replaced in every text."""
    if isinstance(values, Mapping):
        return {name: place(value, workdir) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(place(value, workdir) for value in values)
    return values.replace("{workdir}", workdir) if isinstance(values, str) else values


def rehearse(stages: Sequence[tuple[str, ConfigDict]], workdir: str, done: Collection[str]) -> None:
    """Plans every stage that is not done; touches no device and writes nothing that stays.

    Raises:
        ValueError: naming the stage and its field.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, stage) in enumerate(stages):
            folder = pathlib.Path(scratch, name)
            folder.mkdir()
            written = pathlib.Path(workdir, name, "model.json")
            if name in done:
                if written.is_file():
                    shutil.copy(written, folder)
                continue
            with within(f"stages.{name}.config"), _as_written(scratch):
                sections.check(stage.program, stage.config)
                _check_order(stage.config.to_dict(), [earlier for earlier, _ in stages[:number]])
                own = ConfigDict(place(stage.config.to_dict(), scratch))
                _check_starts(own.to_dict(), scratch)
                models = _PLANS[stage.program](own, lambda data: scratch in data.get("name", ""))
            run_folder.write_models(folder, models)


@contextlib.contextmanager
def _as_written(scratch: str) -> Iterator[None]:
    """Puts ``{workdir}`` back into what is said of bad input."""
    try:
        yield
    except ValueError as error:
        if scratch not in str(error) or not is_ours(error):
            raise
        raise ValueError(str(error).replace(scratch, "{workdir}")) from error


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a config, with its path."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _leaves(value, f"{path}.{name}" if path else name)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value, path)
    elif isinstance(values, str):
        yield path, values


def _check_order(values: Mapping[str, Any], earlier: Sequence[str]) -> None:
    """Raises a ValueError for ``{workdir}/x`` where x is not a stage that runs before."""
    for path, text in _leaves(values):
        for name in _STAGE.findall(text):
            if name not in earlier:
                raise ValueError(
                    f"{path}={text!r} names {name!r}, which is no earlier stage"
                    f"{closest(name, earlier)}; earlier: {', '.join(earlier) or 'none'}"
                )


def _check_starts(values: Mapping[str, Any], scratch: str) -> None:
    """Looks into the folders that are there already and that models start from."""
    labels = ("policy", *values.get("rewards", ()))  # a value model may start from these
    for path, text in _leaves(values):
        section, _, key = path.rpartition(".")
        if key != "init_from" or scratch in text or (section == "value" and text in labels):
            continue
        if pathlib.Path(text or "-").is_dir():
            roles.check_start(section, text)


def _sft(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    planned = fit.open_sources(train_sft.check(config), later)
    return {planned.role: planned.described}


def _dpo(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    planned = fit.open_sources(train_dpo.check(config), later)
    return {planned.role: planned.described}


def _reward(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    planned = fit.open_sources(train_reward.check(config), later)
    train_reward.open_probes(config, later)
    return {planned.role: planned.described}


def _policy(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    return make_plan(config, starts=False, later=later).described


def _labels(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    label_samples.check_config(config)
    if not later(config.data):
        check_problems("label.problems", config.label.problems, plan_sampler(config).prompts)
    return {}


def _step_labels(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    label_steps.check_config(config)
    solutions = config.label.solutions
    if solutions.startswith("jsonl:") and not later(ConfigDict(dict(name=solutions))):
        with within("label.solutions"):
            open_source(solutions)
    if not later(config.data):
        prompts = plan_sampler(config).prompts
        check_problems("label.problems", config.label.get("problems", 1), prompts)
    return {}


def _selection(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    select_rehearsal.check_config(config)
    if not later(config.data):
        select_rehearsal.check_answers(config, plan_sampler(config).prompts)
    return {}


def _evaluation(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    if "reward_sets" in config:
        return _reward_sets(config, later)
    if "best_of" in config:
        evaluate_best_of.check_config(config)
        _policies(config, later)
        return {}
    if "benchmarks" in config:
        evaluate_benchmarks.check_config(config)
        evaluate_benchmarks.plan(config, later)
        return {}
    evaluate.check_config(config)
    _policies(config, later)
    evaluate.check_reward(config, later)
    return {}


def _gold(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    evaluate_gold.check_config(config)
    _policies(config, later)
    return {}


def _reward_sets(config: ConfigDict, later: Later) -> Mapping[str, ModelConfig]:
    evaluate_reward.check_config(config)
    named = [ConfigDict(dict(name=config.reward.init_from)), *config.reward_sets.values()]
    if not any(later(one) for one in named):
        evaluate_reward.open_sets(config, evaluate_reward.open_model(config))
    return {}


def _policies(config: ConfigDict, later: Later) -> None:
    """Plans the sampler of every policy that an evaluation names."""
    for name in config.policies if not later(config.data) else ():
        plan = plan_sampler(of_policy(config, name), f"policies.{name}")
        check_problems("problems", config.problems, plan.prompts)


_PLANS: Mapping[str, Callable[[ConfigDict, Later], Mapping[str, ModelConfig]]] = {
    "train_sft": _sft,
    "train_dpo": _dpo,
    "train_reward": _reward,
    "train_policy": _policy,
    "label_samples": _labels,
    "label_steps": _step_labels,
    "select_rehearsal": _selection,
    "evaluate": _evaluation,
    "evaluate_gold": _gold,
    "evaluate_reward": _reward_sets,
}
