"""ConfigDict -> objects, one function per section of a config, and the checks across sections.

This and the programs beside it are the only readers of ConfigDict. Everything below gets values.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import find
from rlhf_jax.data.examples import ExampleSource
from rlhf_jax.data.preferences import correctness, pairs
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.data.sources import RecordSource, open_source
from rlhf_jax.data.steps import step_labels
from rlhf_jax.data.texts import texts
from rlhf_jax.mesh import ShardingRules, batch_shards, make_mesh, shard_rows
from rlhf_jax.rewards.base import clip, combine, normalise, shrink, split_places
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.types import Algorithm, Needs, Reward, Sampling

KINDS = {"texts": texts, "pairs": pairs, "correctness": correctness, "steps": step_labels}
# Keys of a source's section: where its records come from, and what the run does with them.
_SOURCE = ("name", "split", "data_dir", "options")
_RUN = ("kind", "weight", "rows", "max_prompt", "tokenizer")
# What a reward's factory gets if it names it among its parameters.
RESOURCES = ("model", "params", "mesh", "decode", "records", "rows")
# Keys of a reward's section that wrap the reward; all others go to its factory.
_WRAPPERS = ("name", "weight", "init_from", "normalise", "clip", "shrink")


class Rollout(NamedTuple):
    """The static sizes of one iteration. ``rows`` is what one microbatch holds."""

    prompts: int
    samples: int
    max_tokens: int
    rows: int
    max_draws: int


def call(path: str, factory: Callable, values: Mapping[str, Any]) -> Any:
    """Calls ``factory`` with a section's values; a wrong key is named with the known ones.

    Raises:
        ValueError: naming ``path``, for keys that the factory does not take or lacks.
    """
    check_call(path, factory, values)
    return factory(**values)


def check_call(path: str, factory: Callable, values: Mapping[str, Any]) -> None:
    """Raises the ValueError of `call`; calls nothing."""
    signature = inspect.signature(factory)
    try:
        signature.bind(**values)
    except TypeError as error:
        known = ", ".join(signature.parameters)
        raise ValueError(f"{path}: {error}; it takes: {known}") from error


def tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer of ``config.data.tokenizer``."""
    return load_tokenizer(config.data.tokenizer)


def source(path: str, section: ConfigDict) -> RecordSource:
    """The records that a data section names."""
    values = {k: v for k, v in section.to_dict().items() if k in _SOURCE}
    return call(path, open_source, values)


def examples(path: str, section: ConfigDict, text: Tokenizer, seed: int) -> ExampleSource:
    """Batches of the kind of supervised rows that ``section.kind`` names.

    The other keys of the section are those of its source, of the run (weight, rows), and of the
    factory of its kind in `rlhf_jax.data`.
    """
    if section.kind not in KINDS:
        raise ValueError(f"{path}.kind={section.kind!r}; known: {', '.join(KINDS)}")
    others = (*_SOURCE, *_RUN)
    values = {k: v for k, v in section.to_dict().items() if k not in others}
    found = [source(path, section)]
    return call(path, functools.partial(KINDS[section.kind], found, text), values | {"seed": seed})


def prompts(config: ConfigDict, text: Tokenizer) -> PromptSource:
    """The prompts of ``config.data``, drawn in an order that ``config.seed`` decides."""
    data = config.data
    return PromptSource(
        [source("data", data)],
        text,
        template=data.template,
        max_prompt=data.max_prompt,
        seed=config.seed,
        shuffle=True,
        overlong=data.overlong,
    )


def fetch(
    axes: Mesh, rules: ShardingRules, batches: PromptSource | ExampleSource, position: int, n: int
) -> Any:
    """The batch of ``n`` rows after ``position`` draws; each process reads only its own rows."""
    return shard_rows(axes, rules, n, functools.partial(batches.batch, position, n=n))


def mesh(config: ConfigDict) -> tuple[Mesh, ShardingRules]:
    """The device mesh of ``config.mesh`` and the rules from logical to mesh axes."""
    return make_mesh(config.mesh.to_dict()), ShardingRules()


def algorithm(config: ConfigDict) -> Algorithm:
    """The algorithm that ``config.algorithm.name`` names, made with the section's other keys."""
    values = config.algorithm.to_dict()
    return call("algorithm", find.find("algorithms", values.pop("name")), values)


def sampling(section: ConfigDict) -> Sampling:
    """The sampling values of a section."""
    return call("sampling", make_sampling, section.to_dict())


def optimizer(path: str, section: ConfigDict, steps: int):
    """An optimizer for ``steps`` optimizer steps."""
    return call(path, make_optimizer, {**section.to_dict(), "steps": steps})


def rollout(config: ConfigDict, needs: Needs, axes: Mesh, rules: ShardingRules) -> Rollout:
    """The sizes of one iteration, checked against the algorithm, the update and the mesh.

    Raises:
        ValueError: naming the field, what it is and what would be right.
    """
    sizes, updates = config.rollout, config.updates
    if sizes.samples < needs.min_group:
        raise ValueError(
            f"rollout.samples={sizes.samples} but {config.algorithm.name} needs groups of "
            f"{needs.min_group} or more; set rollout.samples"
        )
    parts = updates.minibatches * updates.microbatches
    if sizes.prompts % parts:
        raise ValueError(
            f"rollout.prompts={sizes.prompts} does not divide into updates.minibatches="
            f"{updates.minibatches} x updates.microbatches={updates.microbatches} whole groups"
        )
    shards = batch_shards(axes, rules)
    if (sizes.prompts // parts) % shards:
        raise ValueError(
            f"a microbatch holds {sizes.prompts // parts} prompts (rollout.prompts="
            f"{sizes.prompts} / {parts}), which the mesh's {shards} batch shards do not divide; "
            "set rollout.prompts, updates.microbatches or mesh.data and mesh.fsdp"
        )
    missing = sorted(set(needs.extra) - set(config.extra))
    if missing:
        raise ValueError(
            f"{config.algorithm.name} needs auxiliary rows {', '.join(missing)}; "
            f"add extra.{missing[0]} to the config"
        )
    return Rollout(
        prompts=sizes.prompts,
        samples=sizes.samples,
        max_tokens=sizes.max_tokens,
        rows=sizes.prompts * sizes.samples // parts,
        max_draws=sizes.max_draws,
    )


def reward_model(section: ConfigDict) -> dict[str, Any] | None:
    """Fields of the model that a reward's factory asks for; None where it asks for none.

    A factory that names `model` among its parameters is learned. One with a `head` reads that
    scalar head and needs no LM head; one without reads log-probs.
    """
    wanted = inspect.signature(find.find("rewards", section.name)).parameters
    if "model" not in wanted:
        return None
    if "head" not in wanted:
        return {"lm_head": True, "score_heads": ()}
    return {"lm_head": False, "score_heads": (section.get("head", wanted["head"].default),)}


def check_reward(label: str, section: ConfigDict) -> None:
    """Raises a ValueError if the factory does not take the section's keys; builds nothing."""
    factory = find.find("rewards", section.name)
    values = {k: v for k, v in section.to_dict().items() if k not in _WRAPPERS}
    given = set(RESOURCES) & set(inspect.signature(factory).parameters) - set(values)
    check_call(f"rewards.{label}", factory, {**dict.fromkeys(given), **values})
    if "weight" not in section:
        raise ValueError(f"rewards.{label}.weight is missing; wanted a number, such as 1.0")
    if section.get("clip", 0.0) < 0:
        raise ValueError(f"rewards.{label}.clip={section.clip}; wanted 0 (off) or a limit")


def reward(label: str, section: ConfigDict, resources: Mapping[str, Any]) -> Reward:
    """One reward with its wrappers, in the order normalise, clip, shrink (methods order).

    A factory gets the resources that it names among its parameters (model, params, mesh,
    decode, records, rows), and the section's keys as values.
    """
    path = f"rewards.{label}"
    factory = find.find("rewards", section.name)
    values = {k: v for k, v in section.to_dict().items() if k not in _WRAPPERS}
    wanted = inspect.signature(factory).parameters
    values |= {k: v for k, v in resources.items() if k in wanted and k not in values}
    made = call(path, factory, values)
    if section.get("normalise", False):
        made = normalise(made)
    if section.get("clip", 0.0):
        made = clip(made, section.clip)
    if section.get("shrink", 1.0) != 1.0:
        made = shrink(made, negative=section.shrink)
    return made


def combined(rewards: Mapping[str, tuple[Reward, float]]) -> dict[str, Reward]:
    """The rewards of one place each, combined: {"device": ..., "host": ...}, empty ones left out.

    Raises:
        ValueError: if there is no reward at all.
    """
    if not rewards:
        raise ValueError("rewards is empty: name at least one reward")
    device, host = split_places(rewards)
    places = {"device": device, "host": host}
    return {place: combine(members) for place, members in places.items() if members}
