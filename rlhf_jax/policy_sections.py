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


class Rehearsal(TypedDict):
    """A term on the auxiliary rows `extra.rehearsal`; see `rlhf_jax.algorithms.auxiliary`."""

    weight: float


class AlgorithmWrappers(TypedDict):
    """The keys of an algorithm's section that do not go to its function."""

    name: str
    correction: NotRequired[Correction]
    omit_truncated: NotRequired[bool]
    select: NotRequired[Select]
    imitate: NotRequired[Imitate]
    rehearsal: NotRequired[Rehearsal]


class Axis(TypedDict):
    """What stays as it is when samples per prompt change; see `rlhf_jax.k_axis`."""

    samples: Count  # at which rollout.prompts and the learning rates were chosen
    hold: NotRequired[str]  # prompts, samples or tokens
    tokens: NotRequired[Count]  # of max_tokens then, for hold="tokens"
    lr_scale: NotRequired[str]  # none, sqrt or linear


class Selection(TypedDict):
    """Which answers are worth rehearsing; see `rlhf_jax.select_rehearsal`."""

    problems: NotRequired[Count]  # that the policy answers
    completions: NotRequired[str]  # in place of its own: a field with given answers
    clusters: Count
    keep: Count  # of each cluster
    above: NotRequired[float]  # and only those with a higher score


class Alarms(TypedDict):
    """When a watched run raises an alarm; see `rlhf_jax.ops.mismatch.Thresholds`."""

    divergence: NotRequired[float]  # of the two reward models, relative to the gain
    in_a_row: NotRequired[Count]  # evaluations
    window: NotRequired[Count]  # evaluations
    kl_max: NotRequired[float]  # nats per completion
    kl_target: NotRequired[float]
    length: NotRequired[float]  # times that of the start
    refusals: NotRequired[float]  # times those of the start


class Monitor(TypedDict):
    """Signs that the reward and what it stands for part; see `rlhf_jax.mismatch_watch`."""

    proxy: str  # label of the reward that trains
    held_out: NotRequired[str]  # label, weight 0: its twin from the other half of the data
    gold: NotRequired[str]  # label, weight 0: what both stand for
    every: Count  # steps of an evaluation
    start: NotRequired[Count]  # batches of the initial policy that the start is measured on
    freeze: NotRequired[bool]  # the learning rate, at an alarm
    refusals: NotRequired[tuple[str, ...]]  # texts of which a refusal holds one
    alarms: NotRequired[Alarms]


class Implicit(TypedDict):
    """Keys of a reward that compares a model with its reference; see `rlhf_jax.implicit_start`."""

    reference: NotRequired[str]  # a folder, in place of what the model started from
    optimizer: NotRequired[Mapping[str, Any]]  # of a model that learns beside the policy
