"""The pytrees that cross module borders. No functions here beyond trivial properties.

One legend of dimension letters for the whole repository:

    N prompts per step      K samples per prompt     B = N*K rollouts, group-major
    P prompt length, LEFT-padded                     T completion length, RIGHT-padded
    S = P + T               V vocabulary             D model width     F MLP width
    H query heads           G key/value heads        Dh head width     C cache length
    L layers                E ensemble members       M rows of supervised data

Rows ``i*K ... i*K+K-1`` of a batch of rollouts are one group (the samples of prompt ``i``).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.pytree import pytree, static

# Host batches are numpy, device batches are jax; both have shapes that tests execute.
Array = jax.Array | np.ndarray
Params = Mapping[str, Any]  # nested dicts of arrays
Metrics = dict[str, "Mean"]


@pytree
class Mean:
    """A sum and what it is divided by: exact under addition over microbatches and hosts."""

    total: Float[Array, ""]
    count: Float[Array, ""]


@pytree
class Term:
    """One term of a loss: ``weight * mean``. The count must not depend on the parameters."""

    weight: Float[Array, ""] | float
    mean: Mean


@pytree
class Prompts:
    """One row per prompt, not repeated; left-padded, so completions begin in column P."""

    tokens: Int[Array, "N P"]
    mask: Bool[Array, "N P"]
    record: Int[Array, " N"]  # index in the data set `source`: host rewards look up answers
    source: Int[Array, " N"]
    draw: Int[Array, " N"]  # how often that record was drawn before (the epoch, usually)


@pytree
class Rollouts:
    """Sampled completions, groups contiguous.

    `mask` is true through the first end-of-text token, that token included. `logprobs` are at
    the sampling temperature without truncation (comparable with the trainer's);
    `behaviour_logprobs` are those of the truncated distribution that was sampled from.
    """

    prompts: Prompts
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    step_ends: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    behaviour_logprobs: Float[Array, "B T"]
    truncated: Bool[Array, " B"]  # ran into max_tokens without an end-of-text token
    sample: Int[Array, " B"]  # 0..K-1 within the group
    version: Int[Array, " B"]  # policy step that sampled it

    @property
    def group_size(self) -> int:
        return self.tokens.shape[0] // self.prompts.tokens.shape[0]


@pytree
class Scores:
    """What reward sources say. `parts` are unweighted, one per source, for logging."""

    outcome: Float[Array, " B"]
    process: Float[Array, "B T"]
    parts: dict[str, Float[Array, " B"]]


@pytree
class CompletionOutput:
    """What a model says about given completions.

    `scores["value"]` is read where token t is predicted (before it is known); every other head
    is read at token t itself. `logprobs` and `entropy` are None for models without an LM head.
    `extra` holds token log-probabilities [M S] of the auxiliary rows in `Experience.extra`.
    """

    logprobs: Float[Array, "B T"] | None
    entropy: Float[Array, "B T"] | None
    scores: dict[str, Float[Array, "B T"]]
    pooled: Float[Array, "B D"] | None = None
    extra: dict[str, Float[Array, "M S"]] | None = None


@pytree
class Texts:
    """Right-padded rows of text. `loss_mask` marks the tokens that train; `segment` numbers
    packed documents from 1 (0 = padding)."""

    tokens: Int[Array, "M S"]
    mask: Bool[Array, "M S"]
    loss_mask: Bool[Array, "M S"]
    segment: Int[Array, "M S"]


@pytree
class Pairs:
    """Preference pairs. `label` is P(chosen is better); `votes` are annotators' (NaN = none)."""

    chosen: Texts
    rejected: Texts
    label: Float[Array, " M"]
    margin: Float[Array, " M"]
    votes: Float[Array, "M A"]
    record: Int[Array, " M"]


@pytree
class Labelled:
    """Completions with a correctness label in [0, 1]."""

    texts: Texts
    label: Float[Array, " M"]


@pytree
class Steps:
    """Solutions with a label in [0, 1] at each step's last token (read only at `step_ends`)."""

    texts: Texts
    step_ends: Bool[Array, "M S"]
    labels: Float[Array, "M S"]


Mixture = dict[str, Texts | Pairs | Labelled | Steps]


@pytree
class Experience:
    """Everything that is frozen before the update. Passes that were skipped hold zeros.

    `kl_coef` is β in this step where a controller drives it; None: the algorithm's own.
    """

    rollouts: Rollouts
    scores: Scores
    logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"]
    extra: dict[str, Texts]
    kl_coef: Float[Array, ""] | None = None


@pytree
class Targets:
    """What the update aims at; `mask` decides which tokens train."""

    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]
    mask: Bool[Array, "B T"]


@pytree
class TokenTables:
    """What token ids mean, as traced tables, so that no id is baked into a program."""

    ends_text: Bool[Array, " V"]  # end-of-text ids
    ends_step: Bool[Array, " V"]  # tokens that hold a line break
    text_before: Bool[Array, " V"]  # visible text before the token's last line break, or in it
    text_after: Bool[Array, " V"]  # visible text after the token's last line break, or in it
    pad: Int[Array, ""]  # written after the end; never recognised by its id


@pytree
class Sampling:
    """Sampling values. Temperature 0 is greedy. All but `truncates` are traced scalars."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]  # 0 = off
    top_p: Float[Array, ""]  # 1 = off
    min_p: Float[Array, ""]  # 0 = off
    truncates: bool = static(default=False)  # whether top-k, top-p or min-p is compiled in


@pytree
class Prefix:
    """Columns that the rows of a group have in common, held once: row n is that of rows
    ``n*K ... n*K+K-1`` of the cache it belongs to. All columns are written, none ever again."""

    keys: tuple[Float[Array, "N G P Dh"], ...]
    values: tuple[Float[Array, "N G P Dh"], ...]
    mask: Bool[Array, "N P"]


@pytree
class Cache:
    """Keys and values per layer, [B G C Dh] each; `length` counts the columns written, one number
    for all rows or one per row, and `mask` tells which columns hold a real token. The columns of
    `prefix` come before these C, and are not counted."""

    keys: tuple[Float[Array, "B G C Dh"], ...]
    values: tuple[Float[Array, "B G C Dh"], ...]
    mask: Bool[Array, "B C"]
    length: Int[Array, ""] | Int[Array, " B"]
    prefix: Prefix | None = None


@pytree
class ModelOutput:
    """Final hidden states (after the last norm, float32) and the updated cache."""

    hidden: Float[Array, "B S D"]
    cache: Cache | None


@pytree
class TrainState:
    """Trainable leaves by role, an optimizer of its own each. No key inside: keys are derived
    from counters."""

    step: Int[Array, ""]
    params: dict[str, Params]
    opt_state: dict[str, Any]
    algorithm: Any
    skipped: Int[Array, ""]  # non-finite updates skipped in a row
    lr_scale: Float[Array, ""]  # of the optimizers' updates; 1 as they are, 0 freezes


@pytree
class RunState:
    """The checkpoint is exactly this; what is not in it does not influence the run."""

    train: TrainState
    reference: Params  # {} where the reference is the policy's frozen base
    rewards: Any  # state of the combined reward, by place: {"device": ..., "host": ...}
    controllers: dict[str, Any]
    carry: Any
    data_position: dict[str, Int[Array, ""]]


class Needs(NamedTuple):
    """What an algorithm asks for; the trainer skips passes that nobody needs."""

    value: bool = False
    reference: bool = False
    process: bool = False  # scores of steps, beside those of completions
    min_group: int = 1
    extra: tuple[str, ...] = ()


class KlCoef(NamedTuple):
    """β of an algorithm that reads `Experience.kl_coef`: what it starts with, and what it must not
    exceed."""

    start: float
    most: float = math.inf


class Algorithm(NamedTuple):
    """An algorithm is two pure functions and a little state.

    init() -> state
    targets(experience, group_size, state) -> (Targets, state)
    loss(output, experience, targets, group_size) -> (dict[str, Term], dict[str, Mean])
    select(scores, group_size) -> Bool[N], or None: which groups carry signal
    wraps: which of `algorithms.wrappers` may be put around it. "correction" wants a policy term
        that is proportional to the advantage of every token, "omit_truncated" rows whose parts in
        the loss do not depend on other rows' masks, "imitate" log-probs that are the policy's.
    kl_coef: β that a controller may drive (`algorithms.base.driven`), or None.
    """

    init: Callable[[], Any]
    targets: Callable[[Experience, int, Any], tuple[Targets, Any]]
    loss: Callable[..., tuple[dict[str, Term], dict[str, Mean]]]
    needs: Needs
    select: Callable[[Scores, int], Array] | None = None
    wraps: tuple[str, ...] = ("correction", "omit_truncated", "select", "imitate")
    kl_coef: KlCoef | None = None


class Learner(NamedTuple):
    """How a reward that learns beside the policy takes one step of its optimizer.

    init(params) -> state: the optimizer's, laid out like the parameters, and what steps count
    step(params, state, forward, loss, chunks) -> (params, state, metrics)
        forward(params, chunk) -> output; loss(output, chunk) -> (dict[str, Term], metrics)
        chunks: leaves [chunks, rows, ...], one forward pass each
    """

    init: Callable[[Params], Any]
    step: Callable[..., tuple[Params, Any, Metrics]]


class Reward(NamedTuple):
    """A reward is one callable, and a weighted sum of rewards is again a reward.

    where      "device" (pure, compiled) or "host" (Python on CPU threads)
    init() -> state: parameters and running statistics, passed as an argument, never closed over
    score(state, rollouts) -> (Scores, state)
    update(state, rollouts, scores, key) -> (state, metrics): online rewards only
    calibrate(state, rollouts) -> state: freezes reference statistics, before the first step
    """

    name: str
    where: str
    init: Callable[[], Any]
    score: Callable[[Any, Rollouts], tuple[Scores, Any]]
    update: Callable[..., tuple[Any, dict[str, Mean]]] | None = None
    calibrate: Callable[[Any, Rollouts], Any] | None = None
