"""How much of what a reward model says is length.

On the host, in float64. Singhal et al. 2023, "A Long Way to Go", https://arxiv.org/abs/2310.03716.
Lengths are numbers of tokens, or of anything else that is counted.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from rlhf_jax.ops.reward_metrics import pair_accuracy
from rlhf_jax.types import Array


class LengthGain(NamedTuple):
    """What a policy gained, and what is left of it among completions of equal length."""

    gain: float  # mean reward after less before
    within: float  # NRG: the same within buckets of length
    ratio: float  # within / gain: the share that is no shift of length; NaN if nothing was gained
    covered: float  # share of all completions in buckets that both policies reach


class PairLengths(NamedTuple):
    """A set of pairs seen through the lengths of its halves."""

    mean_chosen: float
    mean_rejected: float
    equal: float  # share of pairs with halves of one length
    longer_wins: float  # accuracy of the rule "the longer one is better", ½ for equal ones
    accuracy_longer: float  # accuracy of the scores where the better one is longer; NaN: no such
    accuracy_shorter: float  # and where it is shorter
    correlation: float  # Pearson's, of score margins with length margins


def pair_lengths(
    chosen: Float[Array, " M"],
    rejected: Float[Array, " M"],
    chosen_length: Shaped[Array, " M"],
    rejected_length: Shaped[Array, " M"],
) -> PairLengths:
    """Length statistics of pairs beside the scores' accuracy; see `PairLengths`.

    A model that has learnt length alone is right in all pairs whose better half is longer and
    wrong in all others; ``longer_wins`` is "length heuristic accuracy" of Singhal et al., table 5.
    """
    better, worse = (np.asarray(x, np.float64) for x in (chosen, rejected))
    long, short = (np.asarray(x, np.float64) for x in (chosen_length, rejected_length))
    further = long - short

    def accuracy(kept) -> float:
        return pair_accuracy(better[kept], worse[kept]) if kept.any() else math.nan

    return PairLengths(
        mean_chosen=float(long.mean()),
        mean_rejected=float(short.mean()),
        equal=float(np.mean(further == 0)),
        longer_wins=pair_accuracy(long, short),
        accuracy_longer=accuracy(further > 0),
        accuracy_shorter=accuracy(further < 0),
        correlation=correlation(better - worse, further),
    )


def correlation(x: Shaped[Array, " M"], y: Shaped[Array, " M"]) -> float:
    """Pearson's correlation; NaN where there are fewer than two, or one does not vary."""
    a, b = (np.asarray(v, np.float64) for v in (x, y))
    # Compared as they are: after the mean is taken off, rounding looks like variation.
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def within_prompt_correlations(
    lengths: Sequence[Shaped[Array, " _"]], scores: Sequence[Float[Array, " _"]]
) -> Float[np.ndarray, " N"]:
    """`correlation` of length and score among the samples of each prompt; NaN: nothing varies.

    Their mean over prompts is the "within-batch correlation" of Singhal et al., table 4.
    """
    pairs = zip(lengths, scores, strict=True)
    return np.array([correlation(length, score) for length, score in pairs], np.float64)


def length_gain(
    lengths_before: Shaped[Array, " M"],
    rewards_before: Float[Array, " M"],
    lengths_after: Shaped[Array, " L"],
    rewards_after: Float[Array, " L"],
    *,
    width: int = 20,
) -> LengthGain:
    """ΔR, NRG and their ratio for completions of a policy before and after training.

    NRG = Σ_b n_b/n · (mean reward after in bucket b − mean reward before in b), over the buckets
    of `width` tokens that both reach; n_b counts the completions of both in b, n those in all such
    buckets. Singhal et al. 2023, section 3.2. Equal histograms of length make NRG = ΔR; a reward
    that the bucket decides makes NRG = 0.

    Raises:
        ValueError: no bucket is reached by both.
    """
    before = np.asarray(lengths_before, np.float64) // width
    after = np.asarray(lengths_after, np.float64) // width
    old, new = (np.asarray(x, np.float64) for x in (rewards_before, rewards_after))
    shared = np.intersect1d(before, after)
    if not len(shared):
        raise ValueError(
            f"no bucket of {width} tokens holds completions from before and after training; "
            "take wider ones"
        )
    counts = np.array([(before == b).sum() + (after == b).sum() for b in shared])
    gaps = np.array([new[after == b].mean() - old[before == b].mean() for b in shared])
    within = float(counts @ gaps / counts.sum())
    gain = float(new.mean() - old.mean())
    return LengthGain(
        gain=gain,
        within=within,
        ratio=within / gain if gain else math.nan,
        covered=float(counts.sum() / (len(before) + len(after))),
    )
