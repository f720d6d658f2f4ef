"""Supervised training of one model on a weighted mixture of sources: the loop of three programs.

`train_sft` gives it texts and verdicts and keeps the LM head; `train_dpo` gives it pairs beside;
`train_reward` gives it pairs, correctness and step labels and scalar heads instead. Checkpoints,
resume and logs are those of a policy run.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import base_files, build, roles, run_folder
from rlhf_jax.data.examples import ExampleSource
from rlhf_jax.data.members import MemberSource
from rlhf_jax.mesh import ShardingRules, batch_shards
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import QUALITY_HEAD, is_odin
from rlhf_jax.models.lora import partition
from rlhf_jax.models.members import repeated
from rlhf_jax.models.passes import check_positions
from rlhf_jax.models.transformer import Model, decoder
from rlhf_jax.ops.advantage import Advantage
from rlhf_jax.ops.direct_preference import DirectPreference
from rlhf_jax.ops.metrics import add
from rlhf_jax.run_log import RunLog
from rlhf_jax.schema import within
from rlhf_jax.training.direct import REFERENCE
from rlhf_jax.training.experience import COMPILER_OPTIONS
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.training.objective import first_rows
from rlhf_jax.training.supervised import (
    Joint,
    check_joint,
    check_smoothing,
    create_supervised_state,
    label_tables,
    make_supervised_evaluate,
    make_supervised_step,
    own_rows,
)
from rlhf_jax.training.update import compile_update
from rlhf_jax.types import Mixture, Params, RunState

Conclude = Callable[[pathlib.Path, RunState, Mapping[str, float | None]], None]


class Fit(NamedTuple):
    """The static side of a supervised run. ``direct``: pairs and labels train a policy beside
    its start."""

    config: ConfigDict
    role: str
    mesh: Mesh
    rules: ShardingRules
    described: ModelConfig
    model: Model
    sources: Mapping[str, ExampleSource | MemberSource]
    held_out: Mapping[str, ExampleSource]
    optimizer: Any
    direct: DirectPreference | None = None
    joint: Joint | None = None  # of reward models with heads that train together


def check(
    config: ConfigDict,
    role: str,
    kinds: tuple[str, ...],
    *,
    joint: Joint | None = None,
    **changes: Any,
) -> Fit:
    """Checks ``config`` and builds what needs neither parameters nor data.

    Args:
        role: the name under which the model trains and is found by later stages.
        kinds: the kinds of source that this program trains on.
        joint: how heads that train together say one score.
        changes: fields of the model that the program decides (its heads).

    Raises:
        ValueError: naming the field, what it is and what would be right.
    """
    text = build.tokenizer(config)
    if not config.sources:
        raise ValueError(f"sources is empty: name at least one source of kind {', '.join(kinds)}")
    for label, section in config.sources.items():
        build.check_source(f"sources.{label}", section, kinds)
        if "weight" not in section:
            raise ValueError(f"sources.{label}.weight is missing; wanted a number, such as 1.0")
    for label, section in config.eval.sources.items():
        build.check_source(f"eval.sources.{label}", section, kinds)
    mesh, rules = build.mesh(config)
    parts = config.updates.microbatches
    for label, section in config.sources.items():
        if section.rows % (parts * batch_shards(mesh, rules)):
            raise ValueError(
                f"sources.{label}.rows={section.rows} does not divide into updates.microbatches="
                f"{parts} x {batch_shards(mesh, rules)} batch shards of the mesh; set its rows, "
                "updates.microbatches or mesh.data and mesh.fsdp"
            )
    described = roles.describe(config.model, text.vocab_size, **changes)
    smoothing = config.updates.get("smoothing", 0.0)
    with within("updates"):
        check_smoothing(described, smoothing, joint)
    with within("reward"):
        check_joint(described, joint)
    if smoothing and not _smoothed(config):
        raise ValueError(f"updates.smoothing={smoothing} but no source is of kind pairs")
    for part, sections in (("sources", config.sources), ("eval.sources", config.eval.sources)):
        for label, head in own_heads(sections).items():
            if head not in described.score_heads:
                raise ValueError(
                    f"{part}.{label}.head={head!r}; reward.score_heads has "
                    f"{', '.join(described.score_heads) or 'none'}"
                )
    for label, section in config.sources.items():
        with within(f"sources.{label}.max_length"):
            check_positions(described, section.max_length)
    optimizer = build.optimizer("optimizer", config.optimizer, config.train.steps)
    return Fit(
        config,
        role,
        mesh,
        rules,
        described,
        decoder(described, rules),
        {},
        {},
        optimizer,
        joint=joint,
    )


def open_sources(fit: Fit, later: Callable[[ConfigDict], bool] = lambda section: False) -> Fit:
    """``fit`` with its data, read and encoded once.

    Args:
        later: whether a source is not there yet, as a pipeline's earlier stage will write it.

    Raises:
        ValueError: naming the source, and file and line where it is a file; also for a record
            without a prompt, of an advantage model.
    """
    config, text = fit.config, build.tokenizer(fit.config)

    def read(path: str, sections: ConfigDict) -> dict[str, ExampleSource]:
        return {
            label: build.examples(f"{path}.{label}", section, text, config.seed)
            for label, section in sections.items()
            if not later(section)
        }

    def check_prompts(path: str, opened: Mapping[str, ExampleSource]) -> None:
        for label, source in opened.items() if isinstance(fit.joint, Advantage) else ():
            with within(f"{path}.{label}"):
                source.check_prompts()

    held_out = read("eval.sources", config.eval.sources)
    for label, source in held_out.items():
        check_rows(f"eval.sources.{label}", config.eval.sources[label], source)
    sources = read("sources", config.sources)
    check_prompts("eval.sources", held_out)
    check_prompts("sources", sources)
    if own_rows(fit.described):
        orders = dict(members=fit.described.members, seed=config.seed)
        sources = {label: MemberSource(source, **orders) for label, source in sources.items()}
    return fit._replace(sources=sources, held_out=held_out)


def _smoothed(config: ConfigDict) -> list[str]:
    """The sources whose labels follow the model."""
    on = config.updates.get("smoothing", 0.0)
    return [label for label, section in config.sources.items() if on and section.kind == "pairs"]


def check_rows(path: str, section: ConfigDict, source: ExampleSource) -> None:
    """Raises a ValueError for a held-out source that does not fill one batch."""
    if len(source) < section.rows:
        raise ValueError(f"{path}.rows={section.rows} but the source has {len(source)} records")


def create(fit: Fit) -> RunState:
    """The state at step 0."""
    config = fit.config
    key = step_key(config.seed, Purpose.INIT_POLICY, 0)
    folder = config.model.get("init_from", "")
    dtype = fit.described.param_dtype
    loaded = roles.load(folder, fit.mesh, fit.rules, dtype=dtype) if folder else {}
    if fit.described.members > 1 and not roles.ensemble_of(folder):
        loaded = repeated(loaded, fit.described)
    totals = {label: fit.sources[label].total for label in _smoothed(config)}
    params = roles.fill(fit.model, loaded, key, fit.mesh, fit.rules)
    trained, base = partition(params, fit.described)
    # With its adapters off a policy is what it started as; the state below has copies.
    reference = params if fit.direct and not base else base
    return RunState(
        train=create_supervised_state(
            trained,
            fit.optimizer,
            fit.mesh,
            role=fit.role,
            init=lambda: label_tables(totals) if totals else (),
        ),
        reference=reference,
        rewards={},
        controllers={},
        carry={},
        data_position={name: np.asarray(0, np.int32) for name in fit.sources},
    )


def frozen(fit: Fit, state: RunState) -> dict[str, Params]:
    """The trees that no step donates, by role: adapters' base, and the reference of pairs."""
    base = {fit.role: state.reference if fit.described.lora_rank else {}}
    return base | ({REFERENCE: state.reference} if fit.direct else {})


def fetch(fit: Fit, sources: Mapping[str, Any], sections, positions) -> Mixture:
    """One batch of every source; each process reads only its own rows.

    Of a `MemberSource` there are ``rows`` for each member.
    """
    batches = {}
    for name, source in sources.items():
        copies = fit.described.members if isinstance(source, MemberSource) else 1
        batches[name] = build.fetch(
            fit.mesh, fit.rules, source, int(positions[name]), sections[name].rows * copies
        )
    return batches


def evaluator(fit: Fit):
    """A function (params, frozen) -> metrics over every record of the held-out sources."""
    if not fit.held_out:
        return lambda params, frozen: {}
    sections = fit.config.eval.sources
    heads = head_names(fit.described) | dict(heads=own_heads(sections), direct=fit.direct)
    heads |= dict(joint=fit.joint)

    def step(name):
        judge = make_supervised_evaluate(fit.model, {name: 1.0}, role=fit.role, **heads)

        def judged(params, frozen, mixture, kept):
            return judge(params, frozen, first_rows(mixture, kept))

        return jax.jit(judged, compiler_options=COMPILER_OPTIONS)

    steps = {name: step(name) for name in fit.held_out}

    def evaluate(params: Mapping[str, Params], frozen: Mapping[str, Params]):
        total = {}
        for name, source in fit.held_out.items():
            rows = sections[name].rows
            for first in range(0, len(source), rows):
                mixture = fetch(fit, {name: source}, sections, {name: first})
                # Behind the last record the next epoch begins.
                kept = np.int32(min(rows, len(source) - first))
                total = add(total, steps[name](params, frozen, mixture, kept))
        return {f"eval/{name}": mean for name, mean in total.items()}

    return evaluate


def head_names(model: ModelConfig) -> dict[str, str]:
    """Which heads score texts and steps: the names themselves, one head for both, or ODIN's."""
    if len(model.score_heads) == 1:
        return {"outcome_head": model.score_heads[0], "process_head": model.score_heads[0]}
    return {"outcome_head": QUALITY_HEAD} if is_odin(model.score_heads) else {}


def own_heads(sections: ConfigDict) -> dict[str, str]:
    """The heads of the sources that name one themselves."""
    return {label: section.head for label, section in sections.items() if "head" in section}


def run(fit: Fit, workdir: str, conclude: Conclude | None = None) -> RunState:
    """The loop. Resumes if ``workdir`` has a checkpoint.

    Args:
        conclude: gets the run's folder, its last state, which is saved, and its last numbers,
            before summary.json says that the run is done.
    """
    started = time.time()
    config = fit.config
    roles.check_start("model", config.model.get("init_from", ""))
    folder = run_folder.prepare(workdir, config, {fit.role: fit.described})
    base_files.keep(folder, config)
    with jax.set_mesh(fit.mesh), RunLog(folder, config) as log:
        state, first = log.restore(create(fit))
        weights = {name: section.weight for name, section in config.sources.items()}
        step_fn = make_supervised_step(
            fit.model,
            weights,
            fit.optimizer,
            role=fit.role,
            microbatches=config.updates.microbatches,
            centre_coef=config.updates.get("centre_coef", 0.0),
            smoothing=config.updates.get("smoothing", 0.0),
            heads=own_heads(config.sources),
            direct=fit.direct,
            joint=fit.joint,
            **head_names(fit.described),
        )
        update = compile_update(step_fn, state.train, fit.mesh, exact=fit.direct is not None)
        evaluate = evaluator(fit)
        still = frozen(fit, state)
        for step in log.steps(first):
            mixture = fetch(fit, fit.sources, config.sources, state.data_position)
            key = step_key(config.seed, Purpose.UPDATE, step)
            train, metrics = update(state.train, still, mixture, key)
            moved = {
                name: np.asarray(int(position) + config.sources[name].rows, np.int32)
                for name, position in state.data_position.items()
            }
            state = dataclasses.replace(state, train=train, data_position=moved)
            last = step + 1 == config.train.steps
            if last or (step + 1) % config.eval.every == 0:
                metrics = add(metrics, evaluate(train.params, still))
            log.metrics(step, metrics)
            log.checkpoint(step + 1, state)
        if conclude is not None:
            conclude(folder, state, log.settle(config.train.steps, state))
        log.finish(config.train.steps, state, started)
    return state
