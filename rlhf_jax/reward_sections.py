"""Keys of configs that are about reward models alone; see `rlhf_jax.sections`."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from rlhf_jax.schema import Count, Index


class AdvantageLoss(TypedDict, total=False):
    """An advantage model; see `rlhf_jax.ops.advantage.advantage`."""

    margin: float  # what scores stay within, either way
    bound_coef: float
    expected_coef: float
    bound: str  # score or advantage


class OdinLoss(TypedDict, total=False):
    """Length kept out of quality; see `rlhf_jax.ops.odin.odin`."""

    length_coef: float
    orthogonal_coef: float


class Heads(TypedDict):
    """The scalar heads that a reward model gets, how they train, and how many models it is."""

    score_heads: tuple[str, ...]
    members: NotRequired[Count]
    ensemble: NotRequired[str]  # independent, linear or lora
    advantage: NotRequired[AdvantageLoss]  # of the heads outcome and expected
    odin: NotRequired[OdinLoss]  # of the heads quality and length


class Provenance(TypedDict, total=False):
    """Where the data of a source come from; `rlhf_jax.card.check_card` names what is missing."""

    origin: str
    annotators: str
    aggregation: str
    licence: str


class Probes(TypedDict, total=False):
    """What a reward model's card probes it with."""

    source: str  # whose texts; else held-out pairs, another held-out source, or pairs of training
    records: Count
    pairs: str  # jsonl:PATH, pairs of one's own


class Card(TypedDict, total=False):
    """What only a person can say of a reward model; `rlhf_jax.card.check_card` wants all of it."""

    sources: dict[str, Provenance]
    licence: str
    limits: tuple[str, ...]
    probes: Probes


class RewardReport(TypedDict):
    """The reward model to evaluate (none where init_from is empty), and on what."""

    init_from: str
    average: NotRequired[tuple[str, ...]]  # more folders: the mean of all weights
    sources: dict[str, Mapping[str, Any]]


class RewardModel(TypedDict):
    """The reward model to measure, and how steps are read."""

    init_from: str
    average: NotRequired[tuple[str, ...]]  # more folders: the mean of all weights
    dtype: NotRequired[str]
    head: NotRequired[str]  # where a model has several that judge
    aggregate: NotRequired[str]  # of steps, where no head judges whole texts
    threshold: NotRequired[float]  # P above which a step is right
    threshold_from: NotRequired[str]  # or the set whose F1 decides it


class RewardTexts(TypedDict):
    """How the texts of reward sets become tokens; sets may have a template or chat of their own."""

    tokenizer: NotRequired[str]  # in place of the model's own
    chat_template: NotRequired[str | None]
    bos: NotRequired[bool | None]
    template: NotRequired[str | None]
    chat: NotRequired[str | None]
    max_length: Count
    overlong: str
    end_of_text: bool  # completions are closed by the end-of-text token
    rows: Count


class RewardSet(TypedDict):
    """A published set: its form, and where its records come from."""

    form: str
    name: str
    split: NotRequired[str]
    data_dir: NotRequired[str | None]
    options: NotRequired[Mapping[str, Any]]
    template: NotRequired[str | None]
    chat: NotRequired[str | None]
    limit: NotRequired[Index]  # records, spread over the set; 0: all
    pass_rates: NotRequired[tuple[float, ...]]  # of prompts that are kept


class EvaluateReward(TypedDict):
    """`rlhf_jax.evaluate_reward`, and `rlhf_jax.evaluate` with such a config."""

    seed: Index
    mesh: Mapping[str, Any]
    reward: RewardModel
    data: RewardTexts
    resamples: NotRequired[Count]
    reward_sets: dict[str, RewardSet]
