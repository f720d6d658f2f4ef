"""Choosing an answer by the votes of several samples, on the host in float64."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

from rlhf_jax.types import Array


def majority_of_k(
    answers: Sequence[Hashable | None],
    gold: Float[Array, " K"],
    sizes: Sequence[int],
    *,
    weights: Float[Array, " K"] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Float[np.ndarray, " J"]:
    """Expected gold of the answer with most votes among k of one prompt's K samples, for each k.

        argmax_a Σ_i w_i 1[a_i = a]        ties broken at random, in expectation

    Self-consistency (Wang et al. 2022, https://arxiv.org/abs/2203.11171); with a reward model's
    scores as weights that of Wang et al. 2023, https://arxiv.org/abs/2312.08935, equation 6. There
    is no closed form, so the mean is over random subsets; of all K and of one it is exact.

    Args:
        answers: what each sample answers; None is no vote. Without any vote a subset gives 0.
        gold: what each sample is worth; that of an answer is the mean of its samples'.
        sizes: the k.
        weights: of each sample's vote, not negative; None: 1 each.
        draws: subsets for each k between 1 and K.
        seed: the same numbers give the same subsets.

    Raises:
        ValueError: a size outside 1..K, or a negative weight.
    """
    gold = np.asarray(gold, np.float64)
    votes = np.ones(len(gold)) if weights is None else np.asarray(weights, np.float64)
    if (votes < 0).any():
        raise ValueError(f"a vote of weight {votes.min()}; wanted 0 or more")
    places = {a: i for i, a in enumerate(dict.fromkeys(a for a in answers if a is not None))}
    place = np.array([places.get(a, len(places)) for a in answers])
    worth = np.array([gold[place == i].mean() for i in range(len(places))] + [0.0])
    rng = np.random.default_rng(seed)
    found = []
    for size in sizes:
        if not 1 <= size <= len(gold):
            raise ValueError(f"size {size} of majority_of_k; wanted 1 to {len(gold)}, the samples")
        if size == 1:
            cast = (place < len(places)) & (votes > 0)
            found.append(float(np.mean(np.where(cast, gold, 0.0))))
            continue
        rounds = 1 if size == len(gold) else draws
        order = np.argsort(rng.random((rounds, len(gold))), axis=1)[:, :size]
        found.append(float(np.mean(_elected(place[order], votes[order], worth))))
    return np.array(found)


def _elected(place: np.ndarray, votes: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """What the winner of each row's vote is worth; 0 where nobody voted.

    Args:
        place: [R k] the answer's place among all; the last place is no answer.
        votes: [R k] their weights.
        worth: of each place.
    """
    tally = np.zeros((len(place), len(worth)))
    np.add.at(tally, (np.arange(len(place))[:, None], place), votes)
    tally[:, -1] = 0.0
    best = tally.max(axis=1, keepdims=True)
    # Sums of the same weights in another order differ in their last digits.
    tied = (tally >= best * (1 - 1e-12)) & (tally > 0)
    count = tied.sum(axis=1)
    return np.where(count, (tied * worth).sum(axis=1) / np.maximum(count, 1), 0.0)
