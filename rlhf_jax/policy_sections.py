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


class Relative(TypedDict):
    """A reward beside that of given answers; see `rlhf_jax.reference_answers`."""

    answers: str  # the field of a record that holds one, or a list of them


class LengthPenalty(TypedDict):
    """A price of length in standard deviations of the score; see `rlhf_jax.rewards.shaping`."""

    tokens: Count  # that cost nothing
    coef: NotRequired[float]
    batches: NotRequired[Count]  # of the running standard deviation


class Scale(TypedDict):
    """A score in running standard deviations, held between limits."""

    limit: NotRequired[float]
    batches: NotRequired[Count]


class Shaping(TypedDict):
    """Keys of a reward's section that wrap it in something with a memory."""

    relative: NotRequired[Relative]
    length_penalty: NotRequired[LengthPenalty]
    scale: NotRequired[Scale]


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
