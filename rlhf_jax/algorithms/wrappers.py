"""Functions from an algorithm to an algorithm: correct for the sampler, omit rows, select groups,
imitate what is right.

Keys of the config's `algorithm` section beside those of its function, put around it in this order:
``correction``, ``omit_truncated``, ``select``, ``imitate``. The last adds a term to the loss. Each
of the others changes targets alone (and `select`), so the first two want a loss whose term "policy"
is a mean over tokens or completions of something proportional to the advantage; an algorithm of
another kind leaves them out of `Algorithm.wraps`, and one without such a term is refused in any
case. Nothing here is a member of the shelf.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import has_signal, part_of
from rlhf_jax.ops import groups
from rlhf_jax.ops.importance import check_bounds, held_weights, log_weights
from rlhf_jax.ops.masking import fill_padding, mean_of
from rlhf_jax.ops.surrogate import filled
from rlhf_jax.types import Algorithm, Mean, Term

SELECTIONS = ("signal", "range")
_EDGE = 1e-6  # a share such as 7/10 may be off in its last bit, and a limit counts as inside


def correction(
    algorithm: Algorithm,
    *,
    how: str,
    low: float | int | None = None,
    high: float | int | None = None,
) -> Algorithm:
    """Weighs tokens by what the trainer and the sampler say of them: A ← A · held(w).

    w = π_old(y) / π_roll(y), held by `ops.importance.held_weights`, without a gradient. Clipped
    surrogates are proportional to the advantage, so this multiplies the loss of the token:

    ``tis``            min(w_t, C), C = 2. Yao et al. 2025, "Your efficient RL framework secretly
                       brings you off-policy RL training", https://fengyao.notion.site/off-policy-rl
    ``token_mask``     w_t inside [low, high], 0 outside; [0.5, 2]. IcePop, Ling team 2025,
                       https://arxiv.org/abs/2510.18855 (0.5 and 5 there)
    ``sequence_tis``   min(w, C) with w the product over the completion
    ``sequence_mask``  w inside [low, high], 0 outside; [0, 3]. MIS, Liu et al. 2025, "When speed
                       kills stability", and TRL's default

    What a mask takes out still counts in the mean's divisor, as in published trainers; values,
    the KL in the loss and the entropy bonus are not weighed. ``policy/corrected`` is the share of
    tokens where a bound acted. Not for imitation and DPO, which take samples of any policy as they
    are: what was best of K is no sample of π_roll, and a pair has no weight.

    Example:
        >>> corrected = correction(grpo(), how="tis", high=2.0)
    """
    low, high = check_bounds(how, low, high)

    def weigh(experience):
        mask = jnp.asarray(experience.rollouts.mask)
        behaviour = experience.rollouts.behaviour_logprobs
        log_weight = jax.lax.stop_gradient(log_weights(experience.logprobs, behaviour, mask))
        return held_weights(log_weight, mask, how=how, low=low, high=high)

    @jax.named_scope("correction_targets")
    def targets(experience, group_size, state):
        made, state = algorithm.targets(experience, group_size, state)
        weight, _ = weigh(experience)
        return dataclasses.replace(made, advantages=made.advantages * weight), state

    @jax.named_scope("correction_loss")
    def loss(output, experience, targets, group_size):
        terms, metrics = algorithm.loss(output, experience, targets, group_size)
        _check_terms("correction", terms)
        _, held = weigh(experience)
        share = mean_of(held, experience.rollouts.mask)
        return terms, {**metrics, "policy/corrected": share}

    return algorithm._replace(targets=targets, loss=loss)


def omit_truncated(algorithm: Algorithm) -> Algorithm:
    """Completions that ran into the token limit train nothing: mask ← mask · 1[ended].

    Intervention I.4 (OMIT) of Singhal et al. 2023, https://arxiv.org/abs/2310.03716, and the
    overlong filtering of Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.4. Their
    rewards stay in the baseline of their group.

    Example:
        >>> patient = omit_truncated(grpo())
    """

    def targets(experience, group_size, state):
        made, state = algorithm.targets(experience, group_size, state)
        ended = ~jnp.asarray(experience.rollouts.truncated)
        return dataclasses.replace(made, mask=made.mask & ended[:, None]), state

    def loss(output, experience, targets, group_size):
        terms, metrics = algorithm.loss(output, experience, targets, group_size)
        _check_terms("omit_truncated", terms)
        return terms, metrics

    return algorithm._replace(targets=targets, loss=loss)


def select(
    algorithm: Algorithm,
    *,
    how: str,
    reward: str | None = None,
    low: float | int | None = None,
    high: float | int | None = None,
) -> Algorithm:
    """Groups that teach nothing give way to further draws (`training.selection`).

    ``signal``  keeps groups whose rewards are not all equal. Dynamic sampling, Yu et al. 2025,
                https://arxiv.org/abs/2503.14476, equation 11: there the reward is correctness, so
                name that part where shaping rewards tell equal answers apart.
    ``range``   keeps groups whose mean of a part of the reward lies in [low, high]: 0.2 to 0.8 of
                accuracy in Cui et al. 2025, https://arxiv.org/abs/2502.01456 (PRIME). With low = 0
                it leaves out what is already solved, as Khatri et al. 2025,
                https://arxiv.org/abs/2510.13786 (ScaleRL) do for good; nothing is remembered here.

    A group that is left out after the last draw trains nothing either: its mask is empty. An
    algorithm that selects by itself keeps doing so: both must hold.

    Args:
        reward: label of the reward whose unweighted scores decide; left out, with ``signal``, the
            whole reward.

    Example:
        >>> dynamic = select(grpo(), how="signal", reward="exact")
    """
    _check_selection(how, reward, low, high)

    def chosen(scores, group_size):
        if how == "range":
            mean = groups.group_mean(part_of(scores, reward, "select"), group_size)[::group_size]
            # What is not a number stays, and the update sees it.
            kept = ~((mean < low - _EDGE) | (mean > high + _EDGE))
        elif reward is None:
            kept = has_signal(scores, group_size)
        else:
            kept = groups.group_varies(part_of(scores, reward, "select"), group_size)
        return kept if algorithm.select is None else kept & algorithm.select(scores, group_size)

    def targets(experience, group_size, state):
        made, state = algorithm.targets(experience, group_size, state)
        # Padding may hold anything, and `has_signal` adds up all columns.
        process = fill_padding(experience.scores.process, experience.rollouts.mask)
        scores = dataclasses.replace(experience.scores, process=process)
        kept = groups.repeat_groups(chosen(scores, group_size), group_size)
        return dataclasses.replace(made, mask=made.mask & kept[:, None]), state

    return algorithm._replace(targets=targets, select=chosen)


def imitate(
    algorithm: Algorithm, *, reward: str, above: float | int, weight: float | int
) -> Algorithm:
    """Adds the likelihood of right completions: L ← L + μ · mean over their tokens of −log π.

    Right are those whose score by `reward` is larger than `above`. The positive-example loss of
    Yue et al. 2025 (VAPO), https://arxiv.org/abs/2504.05118, with μ = 0.1 there, so that rare
    right answers are used more than a clipped surrogate does. The mean is over all tokens that
    train (the targets' mask) of right completions in the minibatch; without any the term is 0.
    ``policy/imitated`` is their share of all completions. A score that is not a number reaches the
    loss, so that the update is skipped and counted.

    Args:
        reward: label of the reward whose unweighted scores decide.
        above: in units of that score.
        weight: μ.

    Example:
        >>> algorithm = imitate(grpo(), reward="exact", above=0.5, weight=0.1)
    """
    if not weight > 0:
        raise ValueError(f"weight={weight}; wanted more than 0, such as 0.1, or leave imitate out")

    @jax.named_scope("imitate_loss")
    def loss(output, experience, targets, group_size):
        terms, metrics = algorithm.loss(output, experience, targets, group_size)
        if "imitate" in terms:
            raise ValueError("the loss has a term 'imitate' already; leave algorithm.imitate out")
        scores = jax.lax.stop_gradient(part_of(experience.scores, reward, "imitate"))
        scores = scores.astype(jnp.float32)
        right = ~(scores <= above)  # what is not a number too
        mask = jnp.asarray(targets.mask) & right[:, None]
        (logprobs,) = filled(mask, output.logprobs)
        row_weight = jnp.where(jnp.isnan(scores), jnp.nan, 1.0)[:, None]
        term = Term(weight=weight, mean=mean_of(-logprobs * row_weight, mask))
        imitated = jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)
        share = Mean(total=imitated, count=jnp.float32(right.shape[0]))
        return {**terms, "imitate": term}, {**metrics, "policy/imitated": share}

    return algorithm._replace(loss=loss)


def _check_terms(key, terms):
    """Half of a pair, say, would be trained on in silence."""
    if "policy" not in terms:
        raise ValueError(
            f"algorithm.{key} changes the term 'policy' of a loss, and this one has only "
            f"{', '.join(sorted(terms))}; leave {key} out"
        )


def _check_selection(how, reward, low, high):
    if how not in SELECTIONS:
        raise ValueError(f"how={how!r} is unknown; known: {', '.join(SELECTIONS)}")
    if how == "signal" and (low is not None or high is not None):
        raise ValueError(f"low={low} and high={high}, but 'signal' has no limits; say how='range'")
    if how == "range" and (reward is None or low is None or high is None):
        raise ValueError(
            "how='range' needs reward (a label under rewards), low and high, such as 'exact', 0.2 "
            f"and 0.8; got reward={reward!r}, low={low} and high={high}"
        )
    if how == "range" and not low <= high:
        raise ValueError(f"low={low} and high={high}; wanted low <= high")
