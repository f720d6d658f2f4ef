"""ConfigDict -> objects, one function per section of a config, and the checks across sections.

This and the programs beside it are the only readers of ConfigDict. Everything below gets values.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import find
from rlhf_jax.data.examples import ExampleSource
from rlhf_jax.data.forms import check_form
from rlhf_jax.data.members import MemberSource
from rlhf_jax.data.preferences import correctness, pairs
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.data.sources import RecordSource, open_source
from rlhf_jax.data.steps import step_labels
from rlhf_jax.data.texts import texts
from rlhf_jax.data.verdicts import verdicts
from rlhf_jax.k_axis import hold
from rlhf_jax.mesh import ShardingRules, batch_shards, make_mesh, shard_rows
from rlhf_jax.policy_sections import AlgorithmWrappers
from rlhf_jax.rewards.base import (
    aggregate_steps,
    begin_once,
    clip,
    combine,
    length_penalty,
    normalise,
    relative,
    scale,
    shrink,
    split_places,
)
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.schema import check_call, check_keys, check_section, within
from rlhf_jax.sections import Wrappers
from rlhf_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.types import Algorithm, Needs, Reward, Sampling
from rlhf_jax.wrapping import check_label, wrap_algorithm

KINDS = {
    "texts": texts,
    "verdicts": verdicts,
    "pairs": pairs,
    "correctness": correctness,
    "steps": step_labels,
}
# Keys of a source's section: where its records come from, and what the run does with them.
_SOURCE = ("name", "split", "data_dir", "options")
_RUN = ("kind", "weight", "rows", "head", "max_prompt", "tokenizer", "chat_template", "bos")
# What a reward's factory gets if it names it among its parameters.
RESOURCES = (
    "model", "params", "reference", "learner",
    "mesh", "decode", "encode", "records", "rows",
)  # fmt: skip
# Keys of a reward's section that wrap the reward; all others go to its factory.
WRAPPERS = tuple(Wrappers.__annotations__)
# Keys of the algorithm's section that wrap the algorithm; all others go to its function.
_AROUND = tuple(AlgorithmWrappers.__annotations__)


class Rollout(NamedTuple):
    """The static sizes of one iteration. ``rows`` is what one microbatch holds."""

    prompts: int
    samples: int
    max_tokens: int
    rows: int
    max_draws: int
    lr_factor: float = 1.0  # of the K axis


def call(path: str, factory: Callable, values: Mapping[str, Any], **ours: Any) -> Any:
    """Calls ``factory`` with a section's values; what is wrong with them is named with ``path``.

    Args:
        ours: what the factory gets beside them and the section may not set.

    Raises:
        ValueError: for keys that the factory does not take or lacks, and for what it refuses.
    """
    check_call(path, factory, values, given=ours)
    with within(path):
        return factory(**values, **ours)


def member(path: str, shelf: str, section: ConfigDict) -> Callable:
    """The factory of a shelf that ``section.name`` names; the known ones are listed if it is not
    there."""
    if "name" not in section:
        raise ValueError(f"{path}.name is missing; known: {', '.join(find.members(shelf))}")
    with within(f"{path}.name"):
        return find.find(shelf, section.name)


def tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer of ``config.data.tokenizer``."""
    data = config.data
    with within("data.tokenizer"):
        return load_tokenizer(
            data.tokenizer, chat_template=data.get("chat_template"), bos=data.get("bos")
        )


def source(path: str, section: ConfigDict) -> RecordSource:
    """The records that a data section names."""
    values = {k: v for k, v in section.to_dict().items() if k in _SOURCE}
    return call(path, open_source, values)


def check_source(path: str, section: ConfigDict, kinds: Sequence[str] = tuple(KINDS)) -> None:
    """Raises a ValueError for a source of supervised rows that cannot be made; opens nothing."""
    check_keys(path, section, section, ("kind", "name", "rows"))
    if section.kind not in kinds:
        raise ValueError(f"{path}.kind={section.kind!r}; this program takes {', '.join(kinds)}")
    if not isinstance(section.rows, int) or section.rows < 1:
        raise ValueError(f"{path}.rows={section.rows!r}; wanted 1 or more")
    if "head" in section and section.kind in ("texts", "verdicts"):
        raise ValueError(f"{path}.head={section.head!r}, but {section.kind} train no scoring head")
    values = {k: v for k, v in section.to_dict().items() if k not in (*_SOURCE, *_RUN)}
    ours, others = ("sources", "tokenizer", "seed"), (*_SOURCE, *_RUN)
    check_call(path, KINDS[section.kind], values, given=ours, also=others)
    with within(path):
        check_form(section.get("template"), section.get("chat"))


def examples(path: str, section: ConfigDict, text: Tokenizer, seed: int) -> ExampleSource:
    """Batches of the kind of supervised rows that ``section.kind`` names.

    The other keys of the section are those of its source, of the run (weight, rows, head), and
    of the factory of its kind in `rlhf_jax.data`.
    """
    check_source(path, section)
    values = {k: v for k, v in section.to_dict().items() if k not in (*_SOURCE, *_RUN)}
    with within(path):
        return KINDS[section.kind]([source(path, section)], text, seed=seed, **values)


def prompts(config: ConfigDict, text: Tokenizer) -> PromptSource:
    """The prompts of ``config.data``, drawn in an order that ``config.seed`` decides."""
    data = config.data
    with within("data"):
        return PromptSource(
            [source("data", data)],
            text,
            template=data.get("template"),
            chat=data.get("chat"),
            max_prompt=data.max_prompt,
            seed=config.seed,
            shuffle=True,
            overlong=data.overlong,
        )


def fetch(
    axes: Mesh,
    rules: ShardingRules,
    batches: PromptSource | ExampleSource | MemberSource,
    position: int,
    n: int,
) -> Any:
    """The batch of ``n`` rows after ``position`` draws; each process reads only its own rows."""
    return shard_rows(axes, rules, n, functools.partial(batches.batch, position, n=n))


def mesh(config: ConfigDict) -> tuple[Mesh, ShardingRules]:
    """The device mesh of ``config.mesh`` and the rules from logical to mesh axes."""
    with within("mesh"):
        return make_mesh(config.mesh.to_dict()), ShardingRules()


def algorithm(config: ConfigDict, **ours: Any) -> Algorithm:
    """The algorithm that ``config.algorithm.name`` names with its wrappers, in the order
    correction, omit_truncated, select, imitate, rehearsal; its other keys go to its function.

    Args:
        ours: arguments in place of the section's, where the function takes them.
    """
    factory = member("algorithm", "algorithms", config.algorithm)
    section = config.algorithm.to_dict()
    values = {k: v for k, v in section.items() if k not in _AROUND}
    check_call("algorithm", factory, values, also=_AROUND)
    taken = inspect.signature(factory).parameters
    values |= {k: v for k, v in ours.items() if k in taken}
    label = values.get("reward")  # of an algorithm that asks one reward by its label
    if isinstance(label, str):
        check_label("algorithm.reward", label, config.rewards)
    around = {k: v for k, v in section.items() if k in _AROUND}
    check_section("algorithm", around, AlgorithmWrappers)
    return wrap_algorithm(config, call("algorithm", factory, values), around)


def check_sampling(section: ConfigDict) -> None:
    """Raises a ValueError for keys and types that `sampling` does not take; makes nothing."""
    check_call("rollout.sampling", make_sampling, section.to_dict())


def sampling(section: ConfigDict) -> Sampling:
    """The sampling values of a section."""
    return call("rollout.sampling", make_sampling, section.to_dict())


def optimizer(path: str, section: ConfigDict, steps: int, *, lr_factor: float = 1.0):
    """An optimizer for ``steps`` optimizer steps; its learning rate is multiplied by a factor."""
    values = section.to_dict()
    check_call(path, make_optimizer, values, given=("steps",))
    values["learning_rate"] *= lr_factor
    return call(path, make_optimizer, values, steps=steps)


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
    if needs.min_group > 1 and sizes.sampling.get("temperature", 1.0) == 0:
        raise ValueError(
            f"rollout.sampling.temperature=0 but {config.algorithm.name} compares the samples of a "
            "prompt, and greedy ones are all the same; set it above 0"
        )
    parts = updates.minibatches * updates.microbatches
    shards = batch_shards(axes, rules)
    held = hold(sizes, multiple=parts * shards)
    if held.prompts % parts:
        raise ValueError(
            f"rollout.prompts={sizes.prompts} does not divide into updates.minibatches="
            f"{updates.minibatches} x updates.microbatches={updates.microbatches} whole groups"
        )
    if (held.prompts // parts) % shards:
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
        prompts=held.prompts,
        samples=sizes.samples,
        max_tokens=sizes.max_tokens,
        rows=held.prompts * sizes.samples // parts,
        max_draws=sizes.max_draws,
        lr_factor=held.lr_factor,
    )


def policy_steps(config: ConfigDict) -> int:
    """The steps of a run in which the policy trains: all but those of the critic alone."""
    pretrain = config.get("value", {}).get("pretrain") or {}
    return max(config.train.steps - pretrain.get("steps", 0), 1)  # 0 is refused with the critic


def reward_model(section: ConfigDict, path: str = "rewards") -> dict[str, Any] | None:
    """Fields of the model that a reward's factory asks for; None where it asks for none.

    A factory that names `model` among its parameters is learned. One with a `head` reads that
    scalar head, and with `expected` that one too, and needs no LM head; one without reads
    log-probs.
    """
    wanted = inspect.signature(member(path, "rewards", section)).parameters
    if "model" not in wanted:
        return None
    if "head" not in wanted:
        return {"lm_head": True, "score_heads": ()}
    heads = [section.get(n, wanted[n].default) for n in ("head", "expected") if n in wanted]
    return {"lm_head": False, "score_heads": tuple(heads)}


def reward(label: str, section: ConfigDict, resources: Mapping[str, Any]) -> Reward:
    """One reward with its wrappers, in the order aggregate, normalise, relative, clip, shrink,
    length_penalty, scale.

    A factory gets the resources that it names among its parameters (model, params, mesh,
    decode, encode, records, rows), and the section's keys as values. A reward that is relative also
    wants `references`, what asks it for the scores of reference answers, and `num_records`. The
    `init` of one with parameters is for one call (`begin_once`).
    """
    path = f"rewards.{label}"
    factory = member(path, "rewards", section)
    values = {k: v for k, v in section.to_dict().items() if k not in WRAPPERS}
    wanted = inspect.signature(factory).parameters
    values |= {k: v for k, v in resources.items() if k in wanted and k not in values}
    made = call(path, factory, values)
    if "params" in wanted:
        made = begin_once(made)
    if section.get("aggregate", ""):
        made = aggregate_steps(made, section.aggregate)
    if section.get("normalise", False):
        made = normalise(made)
    mesh = resources.get("mesh")
    if "relative" in section:
        asked = dict(references=resources["references"], records=resources["num_records"])
        with within(f"{path}.relative"):
            made = relative(made, **asked, mesh=mesh)
    if section.get("clip", 0.0):
        made = clip(made, section.clip)
    if section.get("shrink", 1.0) != 1.0:
        with within(f"{path}.shrink"):
            made = shrink(made, negative=section.shrink)
    if "length_penalty" in section:
        made = length_penalty(made, **section.length_penalty, mesh=mesh)
    if "scale" in section:
        made = scale(made, **section.scale, mesh=mesh)
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
