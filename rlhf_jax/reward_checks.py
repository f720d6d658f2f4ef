"""What a reward's section may say: all of it is looked at before anything is loaded."""

import inspect
from collections.abc import Sequence

from ml_collections import ConfigDict

from rlhf_jax import build
from rlhf_jax.models.passes import check_positions
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.step_labels import check_how
from rlhf_jax.policy_sections import Shaping
from rlhf_jax.reward_texts import row_sizes
from rlhf_jax.rewards.base import device_reward, length_penalty, scale
from rlhf_jax.schema import check_call, check_section, within
from rlhf_jax.sections import Wrappers
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Learner

_OF_STEPS = ("process_model", "implicit_model")  # outcomes are 0 unless steps are aggregated
_LEARNER = Learner(init=dict, step=dict)  # a place is kept: nothing learns in a check


def check_reward(label: str, section: ConfigDict) -> None:
    """Raises a ValueError if the factory does not take the section's keys; builds nothing."""
    factory = build.member(f"rewards.{label}", "rewards", section)
    values = {k: v for k, v in section.to_dict().items() if k not in build.WRAPPERS}
    ours = set(build.RESOURCES) - set(values)
    check_call(f"rewards.{label}", factory, values, given=ours, also=build.WRAPPERS)
    if "weight" not in section:
        raise ValueError(f"rewards.{label}.weight is missing; wanted a number, such as 1.0")
    wrappers = {k: v for k, v in section.to_dict().items() if k in build.WRAPPERS}
    check_section(f"rewards.{label}", wrappers, Wrappers)
    for key, wanted in (("reference", "reference"), ("optimizer", "learner")):
        if key in section and wanted not in inspect.signature(factory).parameters:
            raise ValueError(f"rewards.{label}.{key} is set, but {section.name} has no use for it")
    if section.get("clip", 0.0) < 0:
        raise ValueError(f"rewards.{label}.clip={section.clip}; wanted 0 (off) or a limit")
    if section.get("aggregate", ""):
        with within(f"rewards.{label}.aggregate"):
            check_how(section.aggregate)
        if section.get("transform") != "logit":
            raise ValueError(
                f"rewards.{label}.aggregate={section.aggregate!r} reads the logits of steps; it is "
                "for a reward that takes transform='logit', such as process_model, and needs it set"
            )
    _check_shaping(f"rewards.{label}", section)


def _check_shaping(path: str, section: ConfigDict) -> None:
    """Raises a ValueError for wrappers of outcomes that could not do what they say."""
    wrapped = [key for key in Shaping.__annotations__ if key in section]
    wrapped += [k for k, off in (("clip", 0.0), ("shrink", 1.0)) if section.get(k, off) != off]
    if wrapped and section.name in _OF_STEPS and not section.get("aggregate", ""):
        way = f" without {path}.aggregate; set it, or" if section.name == "process_model" else ";"
        raise ValueError(
            f"{path}.{wrapped[0]} changes scores of whole completions, and {section.name} has none"
            f"{way} leave {wrapped[0]} out"
        )
    if "relative" in section and "optimizer" in section:
        raise ValueError(
            f"{path}.relative holds scores of reference answers from the start, and a model with "
            "an optimizer says others later on; leave relative out"
        )
    for key in ("clip", "shrink"):
        if "relative" in section and section.get(key, 0.0) not in (0.0, 1.0):
            raise ValueError(
                f"{path}.{key}={section[key]} beside relative, whose scores lie between 0 and 1 "
                f"already; leave {key} out"
            )
    for key, make in (("length_penalty", length_penalty), ("scale", scale)):
        if key in section:
            with within(f"{path}.{key}"):
                make(device_reward("checked", lambda rollouts: rollouts.mask), **section[key])


def check_weights(rewards: ConfigDict) -> None:
    """Raises a ValueError if every reward has the weight 0, which makes a metric of it."""
    if not any(section.get("weight", 1.0) for section in rewards.values()):
        raise ValueError(
            f"the weights of rewards {', '.join(rewards)} are all 0: a reward of weight 0 is a "
            "metric that trains nothing; give one of them another weight"
        )


def check_process(algorithm: str, rewards: ConfigDict) -> None:
    """Raises a ValueError if no reward with a weight can judge steps, for an algorithm that wants
    it. Of the shelf `process_model` and `implicit_model` do, and not once they are aggregated."""
    for section in rewards.values():
        judges = section.name in _OF_STEPS or "." in section.name
        if judges and section.get("weight", 1.0) and not section.get("aggregate", ""):
            return
    raise ValueError(
        f"{algorithm} with these keys trains on scores of steps, and none of rewards "
        f"{', '.join(rewards)} gives them; add a process_model or an implicit_model with a weight "
        "and without aggregate, or take an algorithm or a credit that does without"
    )


def check_made(config: ConfigDict, label: str, tokenizer: Tokenizer, model: Model | None) -> None:
    """Makes the reward from shapes alone; raises a ValueError for a value that it refuses.

    A factory outside of the package may read parameters at once or start something, and is not
    asked; nor are scores of reference answers, which want the data.

    Args:
        tokenizer: whose ids the reward reads.
        model: of a learned reward.
    """
    section, path = config.rewards[label], f"rewards.{label}"
    if "." in section.name:
        return
    shapes = None if model is None else model.shapes()
    resources = dict(
        model=model,
        params=shapes,
        reference=shapes,
        learner=_LEARNER if "optimizer" in section else None,
        mesh=None,
        decode=tokenizer.decode,
        encode=tokenizer.encode,
        records=lambda source, record: {},
        rows=None,
    )
    plain = {key: value for key, value in section.to_dict().items() if key != "relative"}
    build.reward(label, ConfigDict(plain), resources)
    wanted = inspect.signature(build.member(path, "rewards", section)).parameters
    if "question" in wanted:
        question = tokenizer.encode(section.get("question", wanted["question"].default))
        _check_room(config, label, model, question)


def _check_room(config: ConfigDict, label: str, model: Model, question: Sequence[int]) -> None:
    """Raises a ValueError where the model has no positions for a question behind its rows."""
    prompt, tokens = row_sizes(config, config.rewards[label]).values()
    where = f"data.max_prompt={prompt}, rollout.max_tokens={tokens} and rewards.{label}.question"
    with within(where):
        check_positions(model.config, prompt + tokens + len(question))
