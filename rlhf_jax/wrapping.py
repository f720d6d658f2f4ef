"""The wrappers that a config puts around an algorithm, and what they need of the run."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.algorithms.auxiliary import REHEARSAL, rehearsed
from rlhf_jax.algorithms.wrappers import correction, imitate, omit_truncated, select
from rlhf_jax.schema import closest, within
from rlhf_jax.types import Algorithm

_ORDER = ("correction", "omit_truncated", "select", "imitate")


def wrap_algorithm(config: ConfigDict, made: Algorithm, around: Mapping[str, Any]) -> Algorithm:
    """``made`` in the wrappers that ``config.algorithm`` names.

    Args:
        around: the section's keys that do not go to the algorithm's function.

    Raises:
        ValueError: for values that a wrapper refuses, or a wrapper that could not do in this run
            what it says.
    """
    for key in _ORDER:
        if around.get(key, False) and key not in made.wraps:
            can = ", ".join(made.wraps) or "no wrapper"
            raise ValueError(
                f"algorithm.{key} would not change the loss of {around['name']} as it says; "
                f"{around['name']} takes {can}; leave {key} out"
            )
    if "correction" in around:
        _check_correction(config)
        with within("algorithm.correction"):
            made = correction(made, **around["correction"])
    if around.get("omit_truncated", False):
        made = omit_truncated(made)
    if "select" in around:
        with within("algorithm.select"):
            made = select(made, **around["select"])
        _check_select(config)
    if "imitate" in around:
        with within("algorithm.imitate"):
            made = imitate(made, **around["imitate"])
        check_label("algorithm.imitate.reward", around["imitate"]["reward"], config.rewards)
    if REHEARSAL in around:
        _check_rehearsal(config)
        with within("algorithm.rehearsal"):
            made = rehearsed(made, **around[REHEARSAL])
    draws = config.rollout.get("max_draws", 1)
    if draws > 1 and made.select is None:
        raise ValueError(
            f"rollout.max_draws={draws}, but {config.algorithm.name} leaves out no groups, for "
            "which others would be drawn; set algorithm.select, or rollout.max_draws to 1"
        )
    return made


def _check_correction(config: ConfigDict) -> None:
    if config.rollout.sampling.get("temperature", 1.0) == 0:
        raise ValueError(
            "algorithm.correction weighs by the sampler's probabilities, and greedy samples have "
            "none; set rollout.sampling.temperature above 0 or leave correction out"
        )


def _check_rehearsal(config: ConfigDict) -> None:
    if REHEARSAL not in config.extra:
        raise ValueError(
            "algorithm.rehearsal trains on auxiliary rows, and the config has no extra.rehearsal; "
            "add it, a source of texts such as the file that rlhf_jax.select_rehearsal writes"
        )
    section, updates = config.extra[REHEARSAL], config.updates
    if section.get("kind", "texts") != "texts":
        raise ValueError(
            f"extra.rehearsal.kind={section.kind!r}, but algorithm.rehearsal trains on texts"
        )
    parts = updates.minibatches * updates.microbatches
    if isinstance(section.get("rows"), int) and section.rows % parts:
        raise ValueError(
            f"extra.rehearsal.rows={section.rows} does not divide into updates.minibatches="
            f"{updates.minibatches} x updates.microbatches={updates.microbatches}"
        )


def _check_select(config: ConfigDict) -> None:
    section, sizes, rewards = config.algorithm.select, config.rollout, config.rewards
    if sizes.max_draws < 2:
        raise ValueError(
            "algorithm.select draws anew for groups that it leaves out, but rollout.max_draws="
            f"{sizes.max_draws}; set it to 2 or more"
        )
    if section.how == "signal" and sizes.samples < 2:
        raise ValueError(
            "algorithm.select.how='signal' compares the samples of a prompt, but rollout.samples="
            f"{sizes.samples}; set it to 2 or more, or say how='range'"
        )
    if section.get("reward") is not None:
        check_label("algorithm.select.reward", section.reward, rewards)


def check_label(path: str, label: str, rewards: ConfigDict) -> None:
    """Raises a ValueError for a label that is none of the run's rewards.

    Args:
        path: of the key that names it.
    """
    if label not in rewards:
        raise ValueError(
            f"{path}={label!r} is none of rewards{closest(label, rewards)}; "
            f"known: {', '.join(rewards)}"
        )
