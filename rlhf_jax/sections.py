"""Every key of every program's config, with its type.

A key that stands in no class here is a misspelling and stops the program at once, and so does a
value of another type. ``Mapping`` marks a section whose keys are those of whoever gets it: the
factory of an algorithm, a reward or a kind of source, a model's config, the mesh, a data set.
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, get_type_hints

from ml_collections import ConfigDict

from rlhf_jax.data.forms import check_form
from rlhf_jax.policy_sections import (
    Axis,
    Controllers,
    Implicit,
    Monitor,
    Selection,
    Shaping,
    Value,
)
from rlhf_jax.reward_sections import Card, EvaluateReward, Heads, RewardReport
from rlhf_jax.schema import Count, Index, check_section, within


class Tokens(TypedDict):
    """The data section of a program that reads texts through its sources."""

    tokenizer: str
    chat_template: NotRequired[str | None]  # a Jinja file in place of the tokenizer's own template
    bos: NotRequired[bool | None]  # every row begins with the beginning-of-text token
    name: NotRequired[str]
    split: NotRequired[str]
    data_dir: NotRequired[str | None]
    options: NotRequired[Mapping[str, Any]]
    template: NotRequired[str | None]
    chat: NotRequired[str | None]  # in place of template: the field that holds messages
    max_prompt: NotRequired[Count]
    max_length: NotRequired[Count]  # for configs that share one section between programs
    overlong: NotRequired[str]


class Prompts(Tokens):
    """The data section of a program that samples; it has a template or chat."""

    name: str
    max_prompt: Count
    overlong: str


class Rollout(TypedDict):
    """Sampling: prompts a step, samples a prompt."""

    prompts: Count
    samples: Count
    max_tokens: Count
    max_draws: Count
    sampling: Mapping[str, Any]


class PolicyRollout(Rollout):
    """A policy run may hold something else than prompts when samples change."""

    axis: NotRequired[Axis]


class Train(TypedDict):
    """How long a run is, and after how many non-finite updates in a row it stops."""

    steps: Count
    max_skipped: Count


class Checkpoint(TypedDict):
    """Steps between checkpoints, and how many of them stay."""

    every: Count
    keep: Count


class Log(TypedDict):
    """Steps between lines, and the metrics that progress lines show."""

    every: Count
    samples_every: NotRequired[Count]
    samples: NotRequired[Index]
    show: NotRequired[tuple[str, ...]]


class PolicyLog(Log):
    """A policy run also logs samples."""

    samples_every: Count
    samples: Index


class Start(TypedDict):
    """Where parameters come from."""

    init_from: str


class Job(TypedDict):
    """What every program has."""

    seed: Index
    mesh: Mapping[str, Any]
    model: Mapping[str, Any]


class Training(Job):
    """What every program has that trains."""

    train: Train
    checkpoint: Checkpoint


class Updates(TypedDict):
    """The parts of a supervised step."""

    microbatches: Count
    centre_coef: NotRequired[float]
    smoothing: NotRequired[float]  # of the labels of pairs towards the model, per epoch


class HeldOut(TypedDict):
    """Evaluation while a supervised run goes on."""

    every: Count
    sources: dict[str, Mapping[str, Any]]


class TrainSft(Training):
    """`rlhf_jax.train_sft`."""

    data: Tokens
    sources: dict[str, Mapping[str, Any]]
    optimizer: Mapping[str, Any]
    updates: Updates
    eval: HeldOut
    log: Log


class TrainReward(TrainSft):
    """`rlhf_jax.train_reward`."""

    reward: Heads
    card: NotRequired[Card]  # whose absence `rlhf_jax.card` explains


class DirectUpdates(TypedDict):
    """The parts of a step on pairs that a policy learns from."""

    microbatches: Count


class TrainDpo(Training):
    """`rlhf_jax.train_dpo`."""

    data: Tokens
    sources: dict[str, Mapping[str, Any]]
    dpo: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    updates: DirectUpdates
    eval: HeldOut
    log: Log


class Wrappers(Shaping, Implicit):
    """The keys of a reward's section that do not go to its factory."""

    name: str
    weight: float
    init_from: NotRequired[str]
    average: NotRequired[tuple[str, ...]]  # more folders: the mean of all weights
    aggregate: NotRequired[str]  # of a process model: one score of a solution from its steps
    normalise: NotRequired[bool]
    clip: NotRequired[float]
    shrink: NotRequired[float]
    tokenizer: NotRequired[str]  # of a learned reward that does not read the policy's tokens
    template: NotRequired[str | None]  # and how it wants prompts, in place of data's
    chat: NotRequired[str | None]
    max_prompt: NotRequired[int]  # in its tokens
    max_tokens: NotRequired[int]


class PolicyUpdates(TypedDict):
    """The parts of a policy update."""

    epochs: Count
    minibatches: Count
    microbatches: Count


class Optimizers(TypedDict):
    """One optimizer for each model that trains."""

    policy: Mapping[str, Any]
    value: NotRequired[Mapping[str, Any]]


class TrainPolicy(Training):
    """`rlhf_jax.train_policy`."""

    data: Prompts
    value: NotRequired[Value]
    extra: dict[str, Mapping[str, Any]]
    rollout: PolicyRollout
    rewards: dict[str, Mapping[str, Any]]
    algorithm: Mapping[str, Any]
    controllers: NotRequired[Controllers]
    optimizer: Optimizers
    updates: PolicyUpdates
    monitor: NotRequired[Monitor]
    log: PolicyLog


class Label(TypedDict):
    """Problems to label, the share of them that is held out, and pairs a problem."""

    problems: Count
    held_out: float
    pairs: Index
    reward: NotRequired[Mapping[str, Any]]
    margin: NotRequired[float]
    shuffle: NotRequired[bool]  # a control: labels that say nothing


class LabelSamples(Job):
    """`rlhf_jax.label_samples`."""

    data: Prompts
    rollout: Rollout
    label: Label


class SelectRehearsal(Job):
    """`rlhf_jax.select_rehearsal`."""

    data: Prompts
    rollout: Rollout
    rewards: dict[str, Mapping[str, Any]]
    select: Selection


class StepLabels(TypedDict):
    """Which solutions, how many, the share of problems that is held out, and who judges."""

    solutions: str  # policy, data or jsonl:PATH
    problems: NotRequired[Count]  # all, unless the policy draws
    draws: NotRequired[Count]  # solutions of each, where the policy draws
    held_out: float
    reward: NotRequired[Mapping[str, Any]]  # exact_match
    threshold: NotRequired[float]  # a score above it is right
    widths: NotRequired[Count]  # that prefixes are padded to at most
    every: NotRequired[Count]  # batches between two writings


class LabelSteps(Job):
    """`rlhf_jax.label_steps`; ``rollout.samples`` continuations of each prefix."""

    data: Prompts
    rollout: Rollout
    label: StepLabels


class Evaluate(Job):
    """`rlhf_jax.evaluate`."""

    data: Prompts
    rollout: Rollout
    policies: dict[str, Start]
    modes: tuple[str, ...]
    reference: NotRequired[str]
    problems: Count
    reward: RewardReport


class BestOf(TypedDict):
    """How one of several samples is chosen."""

    sizes: tuple[int, ...]  # of the subsets that are chosen from
    marker: NotRequired[str]  # before the number that a sample votes for; "": no votes
    weights: NotRequired[dict[str, str]]  # of votes by reward: sigmoid of its score, or score
    draws: NotRequired[Count]  # random subsets of each size, for votes


class EvaluateBestOf(Job):
    """`rlhf_jax.evaluate` with ``best_of``."""

    data: Prompts
    rollout: Rollout
    policies: dict[str, Start]
    problems: Count
    gold: Mapping[str, Any]
    rewards: dict[str, Mapping[str, Any]]
    best_of: BestOf


class EvaluateGold(Job):
    """`rlhf_jax.evaluate_gold`."""

    data: Prompts
    rollout: Rollout
    policies: dict[str, Start]
    reference: str
    problems: Count
    gold: Mapping[str, Any]


class Benchmark(TypedDict):
    """Data (what is not said here is that of ``data``), how many of them, and who judges."""

    name: str
    split: NotRequired[str]
    data_dir: NotRequired[str | None]
    options: NotRequired[Mapping[str, Any]]
    template: NotRequired[str | None]
    chat: NotRequired[str | None]
    max_prompt: NotRequired[Count]
    overlong: NotRequired[str]
    problems: Count
    max_tokens: NotRequired[Count]  # else rollout.max_tokens
    gold: Mapping[str, Any]


class BenchmarkTokens(Tokens):
    """The data section that benchmarks share."""

    max_prompt: Count
    overlong: str


class EvaluateBenchmarks(Job):
    """`rlhf_jax.evaluate` with ``benchmarks``."""

    data: BenchmarkTokens
    rollout: Rollout
    policies: dict[str, Start]
    start: str
    benchmarks: dict[str, Benchmark]


class Stage(TypedDict):
    """A program and its config."""

    program: str
    config: Mapping[str, Any]


class Pipeline(TypedDict):
    """`rlhf_jax.pipeline`."""

    seed: NotRequired[Index]
    order: tuple[str, ...]
    stages: dict[str, Stage]


PROGRAMS: Mapping[str, type] = {
    "train_sft": TrainSft,
    "train_dpo": TrainDpo,
    "train_reward": TrainReward,
    "train_policy": TrainPolicy,
    "label_samples": LabelSamples,
    "label_steps": LabelSteps,
    "select_rehearsal": SelectRehearsal,
    "evaluate": Evaluate,
    "evaluate_benchmarks": EvaluateBenchmarks,
    "evaluate_best_of": EvaluateBestOf,
    "evaluate_gold": EvaluateGold,
    "evaluate_reward": EvaluateReward,
    "pipeline": Pipeline,
}


def check(program: str, config: ConfigDict) -> None:
    """Holds a config to the keys of its program.

    Raises:
        ValueError: naming the first key that is unknown, absent or of another type.
    """
    if program == "evaluate":
        forms = {"reward_sets": "evaluate_reward", "best_of": "evaluate_best_of"}
        forms["benchmarks"] = "evaluate_benchmarks"
        program = next((forms[key] for key in forms if key in config), program)
    described = PROGRAMS[program]
    check_section("", config.to_dict(), described)
    if get_type_hints(described).get("data") is Prompts:
        with within("data"):
            check_form(config.data.get("template"), config.data.get("chat"))
