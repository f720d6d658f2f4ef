"""Labels from a score: of two samples of one prompt, the one that a reward scores higher is better.

`label_samples` calls this where ``label.reward`` names a reward.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rlhf_jax.policy_sampler import Completion


class Scored(NamedTuple):
    """One completion with its score."""

    sample: Completion
    score: float


def pairs(
    group: Sequence[Scored], *, limit: int, margin: float | int, rng: random.Random
) -> Iterator[tuple[Scored, Scored]]:
    """Up to ``limit`` pairs (better, worse) of samples of one prompt, each text once.

    Ties are no pairs, nor are two whose scores differ by less than ``margin``.
    """
    texts = list({one.sample.completion: one for one in group}.values())
    found = [
        (a, b) for a in texts for b in texts if a.score > b.score and a.score - b.score >= margin
    ]
    yield from rng.sample(found, min(limit, len(found)))


def rows_of(
    group: Sequence[Scored], *, limit: int, margin: float | int, rng: random.Random
) -> dict[str, list[dict[str, Any]]]:
    """The lines that one prompt's samples give, by file: scores and pairs."""
    return {
        "scores": [
            {
                "prompt": one.sample.prompt,
                "completion": one.sample.completion,
                "truncated": not one.sample.ended,
                "score": one.score,
            }
            for one in group
        ],
        "pairs": [
            {
                "prompt": a.sample.prompt,
                "chosen": a.sample.completion,
                "rejected": b.sample.completion,
                "chosen_truncated": not a.sample.ended,
                "rejected_truncated": not b.sample.ended,
                "chosen_score": a.score,
                "rejected_score": b.score,
            }
            for a, b in pairs(group, limit=limit, margin=margin, rng=rng)
        ],
    }
