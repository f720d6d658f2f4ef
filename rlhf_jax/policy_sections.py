"""Keys of configs that are about policy runs alone; see `rlhf_jax.sections`."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from rlhf_jax.schema import Count


class Correction(TypedDict):
    """How samples are weighed for the update; see `rlhf_jax.algorithms.wrappers`."""

    how: str  # tis, token_mask, sequence_tis or sequence_mask
    low: NotRequired[float]
    high: NotRequired[float]


class Select(TypedDict):
    """Which groups train; the others give way to further draws."""

    how: str  # signal or range
    reward: NotRequired[str]  # label of the reward that decides
    low: NotRequired[float]
    high: NotRequired[float]


class AlgorithmWrappers(TypedDict):
    """The keys of an algorithm's section that do not go to its function."""

    name: str
    correction: NotRequired[Correction]
    omit_truncated: NotRequired[bool]
    select: NotRequired[Select]


class Axis(TypedDict):
    """What stays as it is when samples per prompt change; see `rlhf_jax.k_axis`."""

    samples: Count  # at which rollout.prompts and the learning rates were chosen
    hold: NotRequired[str]  # prompts, samples or tokens
    tokens: NotRequired[Count]  # of max_tokens then, for hold="tokens"
    lr_scale: NotRequired[str]  # none, sqrt or linear


class Implicit(TypedDict):
    """Keys of a reward that compares a model with its reference; see `rlhf_jax.implicit_start`."""

    reference: NotRequired[str]  # a folder, in place of what the model started from
    optimizer: NotRequired[Mapping[str, Any]]  # of a model that learns beside the policy
