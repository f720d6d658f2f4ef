"""What a policy run watches for signs of objective mismatch, from its config.

See `rlhf_jax.ops.mismatch` for what is computed, and `rlhf_jax.mismatch_watch` for when.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlhf_jax import build
from rlhf_jax.ops.mismatch import Thresholds
from rlhf_jax.types import Needs

# In lower case; what answers say that do not answer. An incomplete list of English ones.
REFUSALS = (
    *("i cannot", "i can't", "i can not", "i'm sorry", "i am sorry", "i'm unable", "i am unable"),
    *("i'm not able", "i am not able", "i won't", "i will not", "as an ai"),
)
_START = 4  # batches


class Watch(NamedTuple):
    """Labels of rewards ("": none) and when to look at them."""

    proxy: str  # trains the policy
    held_out: str  # its twin from the other half of the data
    gold: str  # what both stand for
    every: int  # steps of an evaluation
    start: int  # batches of the initial policy that the start is measured on
    freeze: bool  # the learning rate, at an alarm
    refusals: tuple[str, ...]  # in lower case; a completion that holds one is a refusal
    thresholds: Thresholds


def make_watch(config: ConfigDict, needs: Needs) -> Watch | None:
    """The watch of ``config.monitor``; None where there is no such section.

    Raises:
        ValueError: for labels and thresholds that cannot work; names the key.
    """
    if "monitor" not in config:
        return None
    section = config.monitor
    watch = Watch(
        proxy=section.proxy,
        held_out=section.get("held_out", ""),
        gold=section.get("gold", ""),
        every=section.every,
        start=section.get("start", _START),
        freeze=section.get("freeze", False),
        refusals=tuple(plain(p) for p in section.get("refusals", REFUSALS)),
        thresholds=Thresholds(**section.get("alarms", {})),
    )
    steps = build.policy_steps(config)
    if watch.every > steps:
        raise ValueError(
            f"monitor.every={watch.every} is more than the policy's {steps} steps, so nothing "
            "would ever be evaluated; make it smaller"
        )
    _check_labels(watch, config.rewards)
    _check_thresholds(watch.thresholds, config.algorithm.name, needs)
    if "" in watch.refusals:
        raise ValueError("monitor.refusals holds an empty text, which every completion does")
    return watch


def plain(text: str) -> str:
    """Text as refusals are looked for: in lower case, with straight apostrophes."""
    return text.lower().replace("\u2019", "'")


def _check_labels(watch: Watch, rewards: ConfigDict) -> None:
    """Raises a ValueError for labels that are unknown, named twice, or of the wrong weight."""
    named = dict(proxy=watch.proxy, held_out=watch.held_out, gold=watch.gold)
    for key, label in named.items():
        if (label or key == "proxy") and label not in rewards:
            raise ValueError(
                f"monitor.{key}={label!r}; wanted one of rewards: {', '.join(rewards)}"
            )
    labels = [label for label in named.values() if label]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        keys = " and ".join(f"monitor.{key}" for key, label in named.items() if label == twice[0])
        raise ValueError(f"{keys} are both {twice[0]!r}; each must be a reward of its own")
    if not rewards[watch.proxy].weight:
        raise ValueError(
            f"monitor.proxy={watch.proxy!r} has weight 0 and trains nothing; name the reward that "
            "trains, or give it a weight"
        )
    for key in ("held_out", "gold"):
        label = named[key]
        if label and rewards[label].weight:
            raise ValueError(
                f"monitor.{key}={label!r} has weight {rewards[label].weight}, so the policy would "
                f"train on it; set rewards.{label}.weight=0.0"
            )
    if watch.held_out:
        _check_twins(watch, rewards)


def _check_twins(watch: Watch, rewards: ConfigDict) -> None:
    """Raises a ValueError where the held-out reward is the very model of the proxy."""
    proxy, other = (_source(rewards[label]) for label in (watch.proxy, watch.held_out))
    if proxy == other and proxy.get("init_from"):
        raise ValueError(
            f"monitor.held_out={watch.held_out!r} is the same model as {watch.proxy!r} "
            f"(init_from={proxy['init_from']!r}), so they can never disagree; train another one on "
            "the other half of the data (options.half)"
        )


def _source(section: ConfigDict) -> dict[str, Any]:
    """What decides which scores a reward gives."""
    return {key: section.get(key) for key in ("name", "init_from", "average", "head")}


def _check_thresholds(thresholds: Thresholds, algorithm: str, needs: Needs) -> None:
    """Raises a ValueError for thresholds that would always or never fire."""
    least = dict(divergence=0, kl_max=0, kl_target=0, length=1, refusals=1)
    for name, low in least.items():
        value = getattr(thresholds, name)
        if value is not None and not value > low:
            raise ValueError(f"monitor.alarms.{name}={value}; wanted a number above {low}")
    for name, few in dict(in_a_row=1, window=3).items():
        value = getattr(thresholds, name)
        if value < few:
            raise ValueError(f"monitor.alarms.{name}={value}; wanted {few} or more evaluations")
    for name in ("kl_max", "kl_target"):
        value = getattr(thresholds, name)
        if value is not None and not needs.reference:
            raise ValueError(
                f"monitor.alarms.{name}={value}, but {algorithm} as configured computes no KL to a "
                f"reference; give it a KL term, or leave {name} out"
            )
