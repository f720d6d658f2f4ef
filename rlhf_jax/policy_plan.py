"""What a policy run will be: everything built from its config that needs no parameters.

All checks happen here, before a device holds anything.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import averages, build, implicit_start, reward_checks, roles
from rlhf_jax.controls import Controls, make_controls
from rlhf_jax.data.examples import ExampleSource
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.mesh import ShardingRules
from rlhf_jax.mismatch_plan import Watch, make_watch
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.passes import check_positions
from rlhf_jax.models.transformer import decoder
from rlhf_jax.reference_answers import check_answers
from rlhf_jax.reward_texts import own_tokenizers, row_sizes, writers
from rlhf_jax.rewards.other_tokens import Writer
from rlhf_jax.schema import check_keys, within
from rlhf_jax.text.steps import token_tables
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.training.state import Models
from rlhf_jax.types import Algorithm, Sampling, TokenTables


class Pretraining(NamedTuple):
    """How many steps of the run the critic trains alone, and whose returns it then learns."""

    steps: int = 0
    algorithm: Algorithm | None = None


class PolicyPlan(NamedTuple):
    """The static side of a run. ``described`` holds the model configs by role: "policy",
    "value" where there is one, and "reward/<label>" for learned rewards; ``writers`` has those that
    read other tokens than the policy's. ``prompts`` is None, and ``extra`` lacks rows, where an
    earlier stage has yet to write them."""

    config: ConfigDict
    mesh: Mesh
    rules: ShardingRules
    sizes: build.Rollout
    sampling: Sampling
    tokenizer: Tokenizer
    tables: TokenTables
    prompts: PromptSource | None
    extra: Mapping[str, ExampleSource]
    described: Mapping[str, ModelConfig]
    models: Models
    algorithm: Algorithm
    optimizers: Mapping[str, Any]
    pretraining: Pretraining
    controls: Controls
    writers: Mapping[str, Writer]
    watch: Watch | None


def make_plan(
    config: ConfigDict,
    *,
    starts: bool = True,
    later: Callable[[ConfigDict], bool] = lambda section: False,
) -> PolicyPlan:
    """Checks ``config`` and builds all that needs no parameters.

    Args:
        starts: whether the folders that roles start from hold parameters already.
        later: whether a data section names what an earlier stage of a pipeline will write.

    Raises:
        ValueError: for whatever in the config cannot work; names the field.
    """
    text = build.tokenizer(config)
    algorithm = build.algorithm(config)
    mesh, rules = build.mesh(config)
    sizes = build.rollout(config, algorithm.needs, mesh, rules)
    build.check_sampling(config.rollout.sampling)
    own = own_tokenizers(config, text)
    described = describe_models(config, text.vocab_size, algorithm, own)
    check_lengths(config, described)
    pretraining = make_pretraining(config, algorithm, described)
    controls = make_controls(config, algorithm, described["policy"], sizes.prompts * sizes.samples)
    watch = make_watch(config, algorithm.needs)
    made = {role: decoder(model, rules) for role, model in described.items()}
    for label in config.rewards:
        reward_checks.check_made(config, label, own.get(label, text), made.get(f"reward/{label}"))
    if starts:
        check_starts(config, described)
    trained = [role for role in ("policy", "value") if role in made]
    factors = dict(lr_factor=sizes.lr_factor, pretrain=pretraining.steps)
    made_optimizers = optimizers(config, trained, **factors)
    # Reads every record, so after what is quick to see.
    prompts = None if later(config.data) else build.prompts(config, text)
    if prompts is not None:
        check_answers(config, prompts)
    reference = dataclasses.replace(described["policy"], lora_rank=0, score_heads=())
    models = Models(
        policy=made["policy"],
        value=made.get("value"),
        reference=decoder(reference, rules) if algorithm.needs.reference else None,
    )
    extra = _extra_rows(config, text, algorithm, described["policy"], later)
    return PolicyPlan(
        config=config,
        mesh=mesh,
        rules=rules,
        sizes=sizes,
        sampling=build.sampling(config.rollout.sampling),
        tokenizer=text,
        tables=token_tables(text, vocab_size=described["policy"].vocab_size),
        prompts=prompts,
        extra=extra,
        described=described,
        models=models,
        algorithm=algorithm,
        optimizers=made_optimizers,
        pretraining=pretraining,
        controls=controls,
        writers=writers(config, own, {k: described[f"reward/{k}"].vocab_size for k in own}),
        watch=watch,
    )


def _extra_rows(config, text, algorithm, policy, later) -> dict[str, ExampleSource]:
    """The auxiliary sources that the algorithm reads, and that are there already."""
    for name in config.extra:
        if name not in algorithm.needs.extra:
            raise ValueError(
                f"extra.{name} is read by nothing; say algorithm.rehearsal=dict(weight=0.1), which "
                "reads extra.rehearsal, or leave it out"
            )
        build.check_source(f"extra.{name}", config.extra[name])
        with within(f"extra.{name}.max_length"):
            check_positions(policy, config.extra[name].max_length)
    return {
        name: build.examples(f"extra.{name}", config.extra[name], text, config.seed)
        for name in algorithm.needs.extra
        if not later(config.extra[name])
    }


def make_pretraining(
    config: ConfigDict, algorithm: Algorithm, described: Mapping[str, ModelConfig]
) -> Pretraining:
    """What ``config.value.pretrain`` says: no steps where it says nothing.

    The critic learns whole returns (λ = 1, Monte Carlo) of the algorithm's own rewards: the
    function of the algorithm gets ``value_lam=1.0`` where it takes it.

    Raises:
        ValueError: without a critic of its own to train, or without steps left for the policy.
    """
    section = config.get("value", {}).get("pretrain")
    if section is None:
        return Pretraining()
    if not algorithm.needs.value:
        raise ValueError(
            f"value.pretrain trains a critic, and {config.algorithm.name} has none; leave it out"
        )
    if "value" not in described:
        raise ValueError(
            "value.pretrain would move the policy: model.score_heads puts the critic on its "
            "trunk; take 'value' out of model.score_heads, or leave value.pretrain out"
        )
    if section.steps >= config.train.steps:
        raise ValueError(
            f"value.pretrain.steps={section.steps} of train.steps={config.train.steps} leave none "
            "for the policy; train.steps counts both, raise it"
        )
    return Pretraining(section.steps, build.algorithm(config, value_lam=1.0))


def optimizers(
    config: ConfigDict, trained: Sequence[str], *, lr_factor: float = 1.0, pretrain: int = 0
) -> dict[str, Any]:
    """An optimizer for each role that trains; learning rates are multiplied by ``lr_factor``.

    Args:
        pretrain: steps in which the critic alone trains: the policy's schedule has none of them.
    """
    check_keys("optimizer", config.optimizer, config.optimizer, trained)
    made = {}
    for role in trained:
        steps = config.train.steps - (pretrain if role == "policy" else 0)
        updates = steps * config.updates.epochs * config.updates.minibatches
        section = config.optimizer[role]
        made[role] = build.optimizer(f"optimizer.{role}", section, updates, lr_factor=lr_factor)
    return made


def check_lengths(config: ConfigDict, described: Mapping[str, ModelConfig]) -> None:
    """Raises a ValueError for rows longer than the positions that a role's model learned."""
    for role, model in described.items():
        _, _, label = role.partition("/")
        prompt, tokens = row_sizes(config, config.rewards[label] if label else {}).values()
        with within(f"data.max_prompt={prompt} and rollout.max_tokens={tokens} for {role}"):
            check_positions(model, prompt + tokens)


def check_starts(config: ConfigDict, described: Mapping[str, ModelConfig]) -> None:
    """Looks whether every folder that a role starts from can be read; reads no parameters.

    Raises:
        ValueError: naming the role and the folder.
    """
    roles.check_start("model", config.model.get("init_from", ""))
    for label, section in config.rewards.items():
        if f"reward/{label}" in described:
            roles.check_start(f"rewards.{label}", section.get("init_from", ""))
            averages.check_starts(f"rewards.{label}", section)
            implicit_start.check_starts(f"rewards.{label}", section)
    if "value" in described and config.value.init_from not in ("policy", *config.rewards):
        roles.check_start("value", config.value.init_from)


def describe_models(
    config: ConfigDict, vocab_size: int, algorithm: Algorithm, own: Mapping[str, Tokenizer]
) -> dict[str, ModelConfig]:
    """Model configs by role: policy, value where needed, and "reward/<label>".

    Args:
        own: the tokenizers of rewards that do not read the policy's tokens, by label.

    The critic has a tree of its own unless the policy's score_heads name "value".
    """
    policy = roles.describe(config.model, vocab_size)
    described = {"policy": policy}
    if not config.rewards:
        raise ValueError("rewards is empty: name at least one reward")
    reward_checks.check_weights(config.rewards)
    if algorithm.needs.process:
        reward_checks.check_process(config.algorithm.name, config.rewards)
    for label, section in config.rewards.items():
        reward_checks.check_reward(label, section)
        changes = build.reward_model(section)
        if changes is not None:
            start = section.get("init_from", "")
            averages.check_average(f"rewards.{label}", section)
            adapters = implicit_start.adapters_of(section, config.model)
            if implicit_start.on_policy_base(section, config.model):
                adapters = policy
            changes = changes | {"lora_rank": 0} | roles.ensemble_of(start)
            if section.name == "ensemble" and "members" not in changes:
                raise ValueError(
                    f"rewards.{label}.init_from={start!r} is one model; name the folder of a run "
                    "with reward.members, or the reward 'outcome_model'"
                )
            if adapters is not None:
                changes = changes | {name: getattr(adapters, name) for name in roles.ADAPTERS}
            size = own[label].vocab_size if label in own else vocab_size
            described[f"reward/{label}"] = _start(f"rewards.{label}", start, policy, size, changes)
            roles.check_heads(f"rewards.{label}", start, changes["score_heads"])
            if implicit_start.compares(section):
                model = described[f"reward/{label}"]
                implicit_start.check(config, label, model, translated=label in own)
    on_trunk, start = "value" in policy.score_heads, config.get("value", {}).get("init_from", "")
    if algorithm.needs.value and not on_trunk:
        described["value"] = _describe_value(config, vocab_size, described, own)
    if on_trunk and start not in ("", "policy"):
        raise ValueError(
            f"value.init_from={start!r}, but model.score_heads puts the critic on the policy's "
            "trunk; set value.init_from to 'policy', or take 'value' out of model.score_heads"
        )
    return described


def _describe_value(
    config: ConfigDict,
    vocab_size: int,
    described: Mapping[str, ModelConfig],
    own: Mapping[str, Tokenizer],
) -> ModelConfig:
    """The config of the critic: that of a reward, of the policy, or of a folder."""
    if "value" not in config:
        raise ValueError(
            f"value is missing and {config.algorithm.name} trains a value model; set "
            "value=dict(init_from=...) to 'policy', a reward's label or a folder"
        )
    start = config.value.init_from
    changes = dict(lm_head=False, score_heads=("value",))
    if start in own:
        raise ValueError(
            f"value.init_from={start!r} is a reward with another tokenizer, and a value reads "
            "the policy's tokens; start it from 'policy' or a folder"
        )
    if start in config.rewards and f"reward/{start}" not in described:
        raise ValueError(f"value.init_from={start!r} is a reward without a model")
    if f"reward/{start}" in described:
        if described[f"reward/{start}"].members > 1:
            raise ValueError(
                f"value.init_from={start!r} is an ensemble, and a value is one model; start it "
                "from 'policy', another reward or a folder"
            )
        return dataclasses.replace(described[f"reward/{start}"], **changes)
    start = "" if start == "policy" else start
    adapters = roles.adapters_on(start, config.model)
    if adapters is not None:
        changes |= {name: getattr(adapters, name) for name in roles.ADAPTERS}
    return _start("value", start, described["policy"], vocab_size, changes)


def _start(
    path: str, folder: str, policy: ModelConfig, vocab_size: int, changes: dict
) -> ModelConfig:
    """The config of a trunk that starts from a folder, or from the policy where it is empty."""
    if not folder:
        return dataclasses.replace(policy, **changes)
    own = {name: getattr(policy, name) for name in roles.OWN_FIELDS}
    section = ConfigDict({"init_from": folder})
    return roles.describe(section, vocab_size, path=path, **own, **changes)
