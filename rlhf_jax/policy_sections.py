"""Keys of configs that are about policy runs alone; see `rlhf_jax.sections`."""

from typing import NotRequired, TypedDict

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


class Imitate(TypedDict):
    """The likelihood of right completions, beside the loss."""

    reward: str  # label of the reward that says which are right
    above: float  # this score of it
    weight: float


class KlController(TypedDict):
    """The KL coefficient follows the KL; see `rlhf_jax.ops.controllers`."""

    target: float  # nats per completion
    horizon: Count  # completions


class ReferenceController(TypedDict):
    """The reference follows the policy."""

    every: Count  # steps of the policy
    decay: NotRequired[float]  # what stays of it, 0: it becomes the policy


class Controllers(TypedDict):
    """Numbers of a run that follow what it measures; see `rlhf_jax.controls`."""

    kl_coef: NotRequired[KlController]
    reference: NotRequired[ReferenceController]


class Pretrain(TypedDict):
    """The first steps of a run, in which the critic alone trains (`rlhf_jax.training.critic`)."""

    steps: Count  # of train.steps


class Value(TypedDict):
    """The critic: where its parameters come from, and how long it trains alone."""

    init_from: str
    pretrain: NotRequired[Pretrain]


class AlgorithmWrappers(TypedDict):
    """The keys of an algorithm's section that do not go to its function."""

    name: str
    correction: NotRequired[Correction]
    omit_truncated: NotRequired[bool]
    select: NotRequired[Select]
    imitate: NotRequired[Imitate]


class Axis(TypedDict):
    """What stays as it is when samples per prompt change; see `rlhf_jax.k_axis`."""

    samples: Count  # at which rollout.prompts and the learning rates were chosen
    hold: NotRequired[str]  # prompts, samples or tokens
    tokens: NotRequired[Count]  # of max_tokens then, for hold="tokens"
    lr_scale: NotRequired[str]  # none, sqrt or linear
