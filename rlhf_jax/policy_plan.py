"""What a policy run will be: everything built from its config that needs no parameters.

All checks happen here, before a device holds anything.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import build, roles
from rlhf_jax.data.examples import ExampleSource
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.mesh import ShardingRules
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import decoder
from rlhf_jax.text.steps import token_tables
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.training.state import Models
from rlhf_jax.types import Algorithm, Sampling, TokenTables


class PolicyPlan(NamedTuple):
    """The static side of a run. ``described`` holds the model configs by role: "policy",
    "value" where there is one, and "reward/<label>" for learned rewards."""

    config: ConfigDict
    mesh: Mesh
    rules: ShardingRules
    sizes: build.Rollout
    sampling: Sampling
    tokenizer: Tokenizer
    tables: TokenTables
    prompts: PromptSource
    extra: Mapping[str, ExampleSource]
    described: Mapping[str, ModelConfig]
    models: Models
    algorithm: Algorithm
    optimizers: Mapping[str, Any]


def make_plan(config: ConfigDict) -> PolicyPlan:
    """Checks ``config`` and builds all that needs no parameters.

    Raises:
        ValueError: for whatever in the config cannot work; names the field.
    """
    text = build.tokenizer(config)
    prompts = build.prompts(config, text)
    algorithm = build.algorithm(config)
    mesh, rules = build.mesh(config)
    sizes = build.rollout(config, algorithm.needs, mesh, rules)
    described = describe_models(config, text.vocab_size, algorithm)
    made = {role: decoder(model, rules) for role, model in described.items()}
    reference = dataclasses.replace(described["policy"], lora_rank=0, score_heads=())
    models = Models(
        policy=made["policy"],
        value=made.get("value"),
        reference=decoder(reference, rules) if algorithm.needs.reference else None,
    )
    updates = config.train.steps * config.updates.epochs * config.updates.minibatches
    return PolicyPlan(
        config=config,
        mesh=mesh,
        rules=rules,
        sizes=sizes,
        sampling=build.sampling(config.rollout.sampling),
        tokenizer=text,
        tables=token_tables(text, vocab_size=described["policy"].vocab_size),
        prompts=prompts,
        extra={
            name: build.examples(f"extra.{name}", config.extra[name], text, config.seed)
            for name in algorithm.needs.extra
        },
        described=described,
        models=models,
        algorithm=algorithm,
        optimizers={
            role: build.optimizer(f"optimizer.{role}", config.optimizer[role], updates)
            for role in ("policy", "value")
            if role in made
        },
    )


def describe_models(
    config: ConfigDict, vocab_size: int, algorithm: Algorithm
) -> dict[str, ModelConfig]:
    """Model configs by role: policy, value where needed, and "reward/<label>".

    The critic has a tree of its own unless the policy's score_heads name "value".
    """
    policy = roles.describe(config.model, vocab_size)
    described = {"policy": policy}
    if not config.rewards:
        raise ValueError("rewards is empty: name at least one reward")
    for label, section in config.rewards.items():
        build.check_reward(label, section)
        changes = build.reward_model(section)
        if changes is not None:
            changes = changes | {"lora_rank": 0}
            start = section.get("init_from", "")
            roles.check_heads(f"rewards.{label}", start, changes["score_heads"])
            described[f"reward/{label}"] = _start(
                f"rewards.{label}", start, policy, vocab_size, changes
            )
    if algorithm.needs.value and "value" not in policy.score_heads:
        start = config.value.init_from
        changes = dict(lm_head=False, score_heads=("value",))
        if start in config.rewards and f"reward/{start}" not in described:
            raise ValueError(f"value.init_from={start!r} is a reward without a model")
        if f"reward/{start}" in described:
            described["value"] = dataclasses.replace(described[f"reward/{start}"], **changes)
        else:
            start = "" if start == "policy" else start
            described["value"] = _start("value", start, policy, vocab_size, changes)
    return described


def _start(
    path: str, folder: str, policy: ModelConfig, vocab_size: int, changes: dict
) -> ModelConfig:
    """The config of a trunk that starts from a folder, or from the policy where it is empty."""
    if not folder:
        return dataclasses.replace(policy, **changes)
    own = {name: getattr(policy, name) for name in roles.OWN_FIELDS}
    section = ConfigDict({"init_from": folder})
    return roles.describe(section, vocab_size, path=path, **own, **changes)
