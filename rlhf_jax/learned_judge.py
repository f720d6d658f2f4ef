"""Learned rewards outside of a policy run: what they say of a policy's samples, by the same code.

`judge` asks rewards that need no model; here are all others, from the folder of a run or of Hugging
Face's form, with wrappers and other tokens as in a policy run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict
from numpy import ndarray

from rlhf_jax import averages, build, implicit_start, roles
from rlhf_jax.judge import Judge, check_judge, make_judge, total
from rlhf_jax.mesh import ShardingRules
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import decoder
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.policy_sections import Shaping
from rlhf_jax.reward_checks import check_made, check_reward
from rlhf_jax.reward_texts import own_tokenizers, writers
from rlhf_jax.rewards.other_tokens import Writer, translated
from rlhf_jax.training.experience import compile_score
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.types import Reward, Rollouts


class _Plan(NamedTuple):
    """What a learned reward will be; no parameters are read yet."""

    config: ConfigDict
    label: str
    section: ConfigDict
    mesh: Mesh
    rules: ShardingRules
    described: ModelConfig
    writer: Writer | None


def check_learned(label: str, section: ConfigDict) -> None:
    """Raises a ValueError for a reward that cannot be made; opens nothing."""
    check_reward(label, _weighed(section))
    for key in Shaping.__annotations__:
        if key in section:
            raise ValueError(
                f"rewards.{label}.{key} is of the run that trains on the reward: it remembers what "
                f"that run scored; leave {key} out"
            )
    if build.reward_model(section) is None:
        check_judge(f"rewards.{label}", section)


def make_learned(label: str, config: ConfigDict) -> Callable[[PolicySampler], Judge]:
    """A function from a policy's sampler to the judge of its samples: the reward
    ``config.rewards[label]``, learned or not.

    The score is outcome plus the sum of process scores. A reward with statistics of its own
    (``normalise``, an ensemble) takes them from the first samples that it judges, and keeps them.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    section = config.rewards[label]
    check_learned(label, section)
    changes = build.reward_model(section)
    if changes is None:
        return lambda sampler: make_judge(f"rewards.{label}", section, sampler)
    plan = _plan(label, config, changes)
    made: dict[str, Any] = {}  # parameters and statistics are those of all policies

    def judge_of(sampler: PolicySampler) -> Judge:
        if not made:
            made["loaded"] = _load(plan)
        reward = _reward(plan, made["loaded"], sampler)
        score = compile_score(reward.score) if reward.where == "device" else reward.score

        def judge(rollouts: Rollouts) -> Float[ndarray, " B"]:
            with jax.set_mesh(plan.mesh):
                if "state" not in made:
                    state = reward.init()
                    calibrate = reward.calibrate
                    made["state"] = state if calibrate is None else calibrate(state, rollouts)
                return total(score(made["state"], rollouts)[0], rollouts)

        return judge

    return judge_of


def _plan(label: str, config: ConfigDict, changes: dict[str, Any]) -> _Plan:
    """Checks what a learned reward starts from."""
    path, section = f"rewards.{label}", config.rewards[label]
    folder = section.get("init_from", "")
    if not folder:
        raise ValueError(f"{path}.init_from is empty; name the run or folder of a reward model")
    text = build.tokenizer(config)
    mesh, rules = build.mesh(config)
    own = own_tokenizers(config, text)
    vocabulary = own[label].vocab_size if label in own else text.vocab_size
    described = roles.describe(
        ConfigDict(dict(init_from=folder)),
        vocabulary,
        path=path,
        **(changes | {"lora_rank": 0} | roles.ensemble_of(folder)),
    )
    roles.check_heads(path, folder, changes["score_heads"])
    roles.check_start(path, folder)
    averages.check(path, section)
    if implicit_start.compares(section):
        implicit_start.check_frozen(path, section, described, translated=label in own)
    theirs = {label: own[label]} if label in own else {}
    check_made(config, label, own.get(label, text), decoder(described, rules))
    writer = writers(config, theirs, {label: described.vocab_size}).get(label)
    return _Plan(config, label, _weighed(section), mesh, rules, described, writer)


def _load(plan: _Plan) -> dict[str, Any]:
    """The parameters, sharded, and what else of a folder the reward's factory gets."""
    model, place = decoder(plan.described, plan.rules), (plan.mesh, plan.rules)
    with jax.set_mesh(plan.mesh):
        folders = averages.folders_of(plan.section)
        known = averages.load(folders, *place, dtype=plan.described.param_dtype)
        key = step_key(plan.config.seed, Purpose.INIT_REWARD, 0)
        params = roles.fill(model, known, key, *place)
        resources = {"params": params}
        if implicit_start.compares(plan.section):
            asked = (plan.section, plan.described, params, *place)
            resources |= implicit_start.trained_beta(plan.section)
            resources["reference"] = implicit_start.load_reference(*asked)
        return resources


def _reward(plan: _Plan, loaded: dict[str, Any], sampler: PolicySampler) -> Reward:
    """The reward with its wrappers, reading the samples of ``sampler``."""
    texts = dict(decode=sampler.text.decode, records=sampler.record)
    model, encode = decoder(plan.described, plan.rules), (plan.writer or sampler.text).encode
    resources = dict(rows=None, mesh=plan.mesh, model=model, encode=encode, **loaded, **texts)
    made = build.reward(plan.label, plan.section, resources)
    return made if plan.writer is None else translated(made, plan.writer, **texts)


def _weighed(section: ConfigDict) -> ConfigDict:
    """The section with the weight that a policy run wants of a reward."""
    return ConfigDict({"weight": 1.0, **section.to_dict()})
