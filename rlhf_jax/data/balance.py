"""What preference data says besides preferences: its lengths, its prompts, its doubtful pairs.

Three changes to the data of Singhal et al. 2023, "A Long Way to Go",
https://arxiv.org/abs/2310.03716, section 4: balanced lengths, random augmentation, truncation by
data cartography. Pure functions of host arrays and records, and of a seed where they draw.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data.examples import first_field
from rlhf_jax.data.sources import Record, RecordSource, place

BIN = 10  # tokens of length difference; the paper's
# Of a pair that was made up nobody said how sure or how much better.
_JUDGED = ("label", "margin", "votes", "confidence")
_TRIES = 100


def balanced_indices(
    chosen: Int[np.ndarray, " M"], rejected: Int[np.ndarray, " M"], *, seed: int, width: int = BIN
) -> Int[np.ndarray, " K"]:
    """Which pairs to keep so that "the longer wins" is right as often as wrong.

    With d = chosen − rejected in tokens, the bins [1, 10], [11, 20], ... of |d| keep equal numbers
    of d > 0 and d < 0, all of the rarer side and as many of the other, drawn by `seed`. Pairs of
    equal length are kept: they say nothing about length. Indices come back in order.

    Args:
        chosen, rejected: lengths of the two completions in tokens.
        width: of a bin, in tokens.
    """
    difference = chosen.astype(np.int64) - rejected
    bins = (np.abs(difference) + width - 1) // width  # 0 for d = 0 alone
    order = np.random.default_rng(seed).permutation(len(difference))
    keep = [np.flatnonzero(difference == 0)]
    for number in np.unique(bins[bins > 0]):
        sides = [
            order[(bins[order] == number) & (side * difference[order] > 0)] for side in (1, -1)
        ]
        fewest = min(map(len, sides))
        keep += [side[:fewest] for side in sides]
    return np.sort(np.concatenate(keep))


def confident_indices(confidence: Float[np.ndarray, " M"], *, drop: float) -> Int[np.ndarray, " K"]:
    """Which examples to keep if the share `drop` of the lowest mean confidence goes (C-TR).

    ⌊drop · M⌋ examples go; among equals the later ones stay. Indices come back in order.

    Args:
        confidence: of each example, see `mean_confidence`.
    """
    gone = int(drop * len(confidence))
    return np.sort(np.argsort(confidence, kind="stable")[gone:])


def mean_confidence(differences: Float[np.ndarray, "epochs M"]) -> Float[np.ndarray, " M"]:
    """mean over epochs of σ(r_chosen − r_rejected): the confidence of data cartography.

    Swayamdipta et al. 2020, https://arxiv.org/abs/2009.10795, equation 1.
    """
    x = np.clip(differences.astype(np.float64), -500.0, 500.0)  # exp stays finite
    return np.mean(1 / (1 + np.exp(-x)), axis=0)


class Augmented:
    """Records of pairs, and behind them pairs whose rejected side answers another prompt (R-DA).

    Extra pair j is a record x, drawn by `seed`, with the chosen reply of another record, whose
    prompt is another one, as its rejected side. The answer to the question beats a good answer to
    another question whatever the lengths. Extra pairs are certain (label 1, margin 0, no votes).

    Args:
        records: the source.
        question: what a record asks, to see whether two ask the same.
        share: extra pairs per pair of the source (the paper: 0.25).
        seed: decides which; the draws of one seed do not depend on the order of training.
        chosen, rejected: the first of these fields that a record has.

    Raises:
        ValueError: a record has no reply or no question, or no other prompt is found.
    """

    def __init__(
        self,
        records: RecordSource,
        question: Callable[[Record], Any],
        *,
        share: float,
        seed: int,
        chosen: Sequence[str] = ("chosen",),
        rejected: Sequence[str] = ("rejected",),
    ):
        self._records, self._question = records, question
        self._fields = (tuple(chosen), tuple(rejected))
        rng = np.random.default_rng(seed)
        count = int(share * len(records))
        own = rng.permutation(len(records))[np.arange(count) % max(len(records), 1)]
        self._extra = [(int(index), self._other(int(index), rng)) for index in own]

    def __len__(self) -> int:
        return len(self._records) + len(self._extra)

    def __getitem__(self, index: int, /) -> Record:
        if index < len(self._records):
            return self._records[index]
        own, other = (self._records[i] for i in self._extra[index - len(self._records)])
        made = {name: value for name, value in own.items() if name not in _JUDGED}
        reply = other[first_field(other, self._fields[0])]
        made[first_field(own, self._fields[1])] = _answer(reply)
        made["rejected_truncated"] = other.get("chosen_truncated", False)
        return {**made, "confidence": 1.0}

    def place(self, index: int) -> str:
        """Where a record, or that whose prompt an extra pair has, stands; for messages."""
        if index < len(self._records):
            return place(self._records, index)
        return f"augmented {place(self._records, self._extra[index - len(self._records)][0])}"

    def _other(self, index: int, rng: np.random.Generator) -> int:
        """A record that asks something else."""
        asked = self._asked(index)
        for _ in range(_TRIES):
            other = int(rng.integers(len(self._records)))
            if self._asked(other) != asked:
                return other
        raise ValueError(
            f"{place(self._records, index)}: no other prompt in {_TRIES} draws from "
            f"{len(self._records)} records; augment needs a source of several prompts"
        )

    def _asked(self, index: int) -> Any:
        try:
            return self._question(self._records[index])
        except ValueError as error:
            raise ValueError(f"{place(self._records, index)}: {error}") from error


def _answer(reply: Any) -> Any:
    """A reply without its prompt: of messages those that the assistant says last."""
    if not isinstance(reply, list | tuple):
        return reply
    roles = [one.get("role") if isinstance(one, Mapping) else None for one in reply]
    said = next((i for i, role in enumerate(reversed(roles)) if role != "assistant"), len(roles))
    return list(reply[len(reply) - said :]) if said else reply
