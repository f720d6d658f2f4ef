"""Texts in groups that are alike, and the best of each group, on the host in float64."""

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.vq import ClusterError, kmeans2

from rlhf_jax.types import Array

_TINY = 1e-12  # an embedding that is this near the mean of all has no direction
_TRIES = 8  # starts of k-means, of which the tightest is kept
_ROUNDS = 50


def directions(embeddings: Float[Array, "M D"]) -> Float[np.ndarray, "M D"]:
    """x ← (x − mean) / ‖x − mean‖: mean-pooled hidden states have a large part in common, and what
    tells texts apart is the direction of the rest. An embedding equal to the mean becomes 0."""
    x = np.asarray(embeddings, np.float64)
    x = x - x.mean(axis=0)
    size = np.linalg.norm(x, axis=1, keepdims=True)
    return np.where(size > _TINY, x / np.maximum(size, _TINY), 0.0)


def cluster(points: Float[Array, "M D"], count: int, *, seed: int) -> Int[np.ndarray, " M"]:
    """The cluster of each point, from 0 on, the largest cluster first (k-means).

        argmin Σ_i ‖x_i − c_{l(i)}‖²      the best of 8 starts by k-means++

    The same points, count and seed give the same clusters.

    Args:
        count: clusters, each of at least one point.

    Raises:
        ValueError: fewer distinct points than clusters, or a point that is not finite.
    """
    points = np.asarray(points, np.float64)
    if not np.isfinite(points).all():
        bad = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise ValueError(f"the embedding of text {bad} is not finite")
    distinct = len(np.unique(points, axis=0))
    if not 1 <= count <= distinct:
        raise ValueError(
            f"{count} clusters of {distinct} different embeddings; wanted 1 to {distinct}"
        )
    best, found = np.inf, None
    for attempt in range(_TRIES):
        rng = np.random.default_rng((seed, attempt))
        try:
            centres, labels = kmeans2(
                points, count, iter=_ROUNDS, minit="++", missing="raise", rng=rng
            )
        except ClusterError:  # of this start a cluster lost all of its points
            continue
        spread = float(np.sum((points - centres[labels]) ** 2))
        if spread < best and len(np.unique(labels)) == count:
            best, found = spread, labels
    if found is None:
        raise ValueError(
            f"k-means found no {count} clusters of {len(points)} texts with a text in each, from "
            f"{_TRIES} starts; ask for fewer clusters"
        )
    sizes = np.bincount(found, minlength=count)
    order = np.argsort(-sizes, kind="stable")
    return np.argsort(order, kind="stable")[found]


def best_of_clusters(
    labels: Int[Array, " M"],
    scores: Float[Array, " M"],
    keep: int,
    *,
    above: float | int = -np.inf,
) -> Int[np.ndarray, " R"]:
    """The places of the `keep` points with the highest scores of each cluster, in their order.

    Of equal scores the earlier point; of a cluster with fewer points all.

    Args:
        above: no point with this score or a lower one is kept, so that a cluster may have none.

    Raises:
        ValueError: a score that is not finite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"the score of text {bad} is {scores[bad]}; wanted a finite number")
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > above]
    kept = [order[labels[order] == one][:keep] for one in np.unique(labels)]
    return np.sort(np.concatenate(kept))
