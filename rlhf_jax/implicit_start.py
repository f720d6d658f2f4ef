"""Where an implicit reward model and its reference come from: two trees, or adapters on one base.

    init_from                    the model          its reference (unless ``reference`` names one)
    a run of `train_dpo`         what it trained    what that run started from
    any other folder             what it holds      the same: the model learns here (``optimizer``)
    nothing                      the policy's start the same

A model on the policy's base is adapters, and the base is its reference; it is lent for a call and
kept once. That is so for a run of `train_dpo` whose adapters are on the same folder as the
policy's, and, where the policy has adapters, for a model that starts where the policy does.
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import build, roles, run_folder
from rlhf_jax.mesh import ShardingRules
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import architecture
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import Model, decoder
from rlhf_jax.ops.direct_preference import MEANS, DirectPreference, direct_preference
from rlhf_jax.schema import closest, within
from rlhf_jax.text.hub import local_folder
from rlhf_jax.training.checkpoint import restore_subtree
from rlhf_jax.training.online import make_learner
from rlhf_jax.types import Params


def compares(section: ConfigDict, path: str = "rewards") -> bool:
    """Whether a reward's factory asks for a reference beside its model."""
    wanted = inspect.signature(build.member(path, "rewards", section)).parameters
    return "reference" in wanted


def check(config: ConfigDict, label: str, described: ModelConfig, *, translated: bool) -> None:
    """Raises a ValueError for an implicit reward that cannot be made; opens no parameters.

    Args:
        translated: whether the reward reads other tokens than the policy writes.
    """
    section, path = config.rewards[label], f"rewards.{label}"
    learns, judge = "optimizer" in section, section.get("label", "")
    if learns:
        build.optimizer(f"{path}.optimizer", section.optimizer, build.policy_steps(config))
        if section.get("normalise", False):
            raise ValueError(
                f"{path}.normalise holds the spread of scores at the start, where a model that "
                "learns beside the policy may say 0 of everything; leave it out, and set the weight"
            )
        others = [name for name in config.rewards if name != label]
        if judge not in others:
            raise ValueError(
                f"{path}.label={judge!r}{closest(judge, others)}; wanted the reward that says "
                f"which completions are right: {', '.join(others) or 'there is no other'}"
            )
    elif judge:
        raise ValueError(
            f"{path}.label={judge!r} says what a model learns that has an optimizer; set "
            f"{path}.optimizer, or leave label out"
        )
    if translated and learns:
        raise ValueError(
            f"{path}.optimizer is set, but the reward reads other tokens than the policy writes; "
            "leave it out, or name a model with the policy's tokenizer"
        )
    per_step = section.get("per", "token") == "step"
    if config.algorithm.get("credit", "sequence") == "steps" and not per_step:
        raise ValueError(
            f"algorithm.credit='steps' reads scores at the ends of steps, and {path} scores every "
            "token; set its per='step'"
        )
    start = config.model.get("init_from", "")
    check_reference(path, section, described, translated=translated, policy=start)


def check_frozen(
    path: str, section: ConfigDict, described: ModelConfig, *, translated: bool
) -> None:
    """`check` and `check_starts` outside of a policy run, where nothing learns."""
    for key in ("optimizer", "label"):
        if key in section:
            raise ValueError(f"{path}.{key} is set, but no reward learns here; leave it out")
    check_reference(path, section, described, translated=translated)
    check_starts(path, section)


def check_reference(
    path: str,
    section: ConfigDict,
    described: ModelConfig,
    *,
    translated: bool,
    policy: str = "",
) -> None:
    """Raises a ValueError where scores cannot be carried over from other tokens, no reference can
    be had that says anything, or the run that a model is from has no β for a sum over tokens.

    Args:
        policy: the folder that the policy starts from, and a model without one of its own with it.
    """
    if translated and section.get("per", "token") != "step":
        raise ValueError(
            f"{path} reads other tokens than the policy writes, and only scores of steps can be "
            "carried over; set per='step', or name a model with the policy's tokenizer"
        )
    _check_beta(path, section)
    learns = "optimizer" in section
    folder, start = section.get("reference", ""), section.get("init_from", "")
    if not folder:
        if not learns and not _may_be_direct(start):
            raise ValueError(
                f"{path}.init_from={start!r} has no reference of its own, as a run of train_dpo "
                f"has: beside itself a model says 0. Set {path}.reference to a folder, or "
                f"{path}.optimizer for a model that learns beside the policy"
            )
        return
    start = start or policy
    if not learns and start and _same(folder, start) and not section.get("average"):
        raise ValueError(
            f"{path}.reference={folder!r} is what the model starts from, and beside itself a model "
            f"says 0. Set {path}.reference to another folder, or {path}.optimizer for a model that "
            "learns beside the policy"
        )
    with within(f"{path}.reference"):
        found, wanted = architecture(roles.described_in(folder)), architecture(described)
        for name in wanted:
            if found[name] != wanted[name]:
                raise ValueError(
                    f"{folder} has {name}={found[name]}, the model has {wanted[name]}; wanted "
                    "models of one shape"
                )


def check_starts(path: str, section: ConfigDict) -> None:
    """Looks whether the reference's parameters can be read; reads none."""
    if section.get("reference", ""):
        roles.check_start(f"{path}.reference", section.reference)


def adapters_of(section: ConfigDict, policy: ConfigDict) -> ModelConfig | None:
    """The model of a learned reward that is trained adapters on the policy's base; None of others.

    The mean of adapters (``average``) is taken of what they are merged into, and so is a model that
    is its own reference.
    """
    start = section.get("init_from", "")
    if section.get("average") or (compares(section) and not _may_be_direct(start)):
        return None
    return roles.adapters_on(start, policy)


def on_policy_base(section: ConfigDict, policy: ConfigDict) -> bool:
    """Whether an implicit model is fresh adapters on the base of the policy's."""
    if not policy.get("lora_rank", 0) or not compares(section) or section.get("average"):
        return False
    start, base = section.get("init_from", ""), policy.get("init_from", "")
    return not start or (bool(base) and _same(start, base) and not _is_direct(start))


def trained_beta(section: ConfigDict) -> dict[str, float]:
    """{"beta": β} of the run of `train_dpo` that a section starts from; else {}."""
    values = _direct(section.get("init_from", ""))
    return {} if values is None else {"beta": values.beta}


def load_reference(
    section: ConfigDict, described: ModelConfig, start: Params, mesh: Mesh, rules: ShardingRules
) -> Params | None:
    """The whole tree of the reference, without adapters; None where it is the base under them.

    Args:
        described: the config of the implicit model.
        start: the model's parameters at step 0, which are the reference's where no other is named.
    """
    plain = decoder(dataclasses.replace(described, lora_rank=0), rules)
    folder, own = section.get("reference", ""), section.get("init_from", "")
    if folder:
        known = roles.load(folder, mesh, rules, dtype=described.param_dtype)
    elif described.lora_rank:
        return None
    elif _is_direct(own):
        known = _reference_of(local_folder(own), mesh, rules)
    else:
        known = start
    return roles.fill(plain, known, jax.random.key(0), mesh, rules)


def resources(
    config: ConfigDict,
    label: str,
    model: Model,
    params: Params,
    mesh: Mesh,
    rules: ShardingRules,
) -> Mapping[str, Any]:
    """What an implicit reward's factory gets beside model and parameters, in a policy run."""
    section = config.rewards[label]
    found = trained_beta(section)
    found |= {"reference": load_reference(section, model.config, params, mesh, rules)}
    if "optimizer" in section:
        path = f"rewards.{label}.optimizer"
        optimizer = build.optimizer(path, section.optimizer, build.policy_steps(config))
        found["learner"] = make_learner(optimizer, model, mesh)
    return found


def _check_beta(path: str, section: ConfigDict) -> None:
    """Raises a ValueError for a β that was trained beside a mean over tokens, if none is set."""
    values = _direct(section.get("init_from", ""))
    if values is not None and values.loss in MEANS and "beta" not in section:
        raise ValueError(
            f"{path}.init_from={section.init_from!r} was trained with dpo.loss={values.loss!r}, "
            f"whose beta={values.beta} is of the mean over an answer's tokens; {section.name} pays "
            f"each token, and so the sum. Set {path}.beta, such as that by the answers' length in "
            "tokens, or train with dpo.loss='sigmoid'"
        )


def _reference_of(folder: str, mesh: Mesh, rules: ShardingRules) -> Params:
    """What a run of `train_dpo` started from: its saved reference, or the base of its adapters."""
    config = run_folder.read_models(folder)["policy"]
    if config.lora_rank:
        return partition(roles.load_role(folder, "policy", mesh, rules), config)[1]
    return restore_subtree(folder, ("reference",), roles.sharded_shapes(config, mesh, rules))


def _direct(folder: str) -> DirectPreference | None:
    """The loss of the run of `train_dpo` whose folder it is; None for other folders."""
    if not _is_direct(folder):
        return None
    return direct_preference(**run_folder.read_json(_config_of(folder))["dpo"])


def _is_direct(folder: str) -> bool:
    """Whether a folder is that of a run of `train_dpo`."""
    path = _config_of(folder)
    return path is not None and path.is_file() and "dpo" in run_folder.read_json(path)


def _may_be_direct(folder: str) -> bool:
    """The same, and true of the folder of an earlier stage that has yet to run."""
    path = _config_of(folder)
    planned = path is not None and (path.parent / "model.json").is_file() and not path.is_file()
    return planned or _is_direct(folder)


def _config_of(folder: str) -> pathlib.Path | None:
    return pathlib.Path(local_folder(folder)) / "config.json" if folder else None


def _same(one: str, other: str) -> bool:
    return pathlib.Path(local_folder(one)).resolve() == pathlib.Path(local_folder(other)).resolve()
