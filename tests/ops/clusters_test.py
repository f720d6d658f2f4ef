"""Clusters of texts and the best of each: literal points, a fixed order, what is refused."""

import numpy as np
import pytest

from rlhf_jax.ops.clusters import best_of_clusters, cluster, directions

BLOBS = np.repeat([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], [4, 6, 2], axis=0)


def points(seed=0):
    return BLOBS + 0.1 * np.random.default_rng(seed).normal(size=BLOBS.shape)


def test_clusters_are_the_blobs_the_largest_first():
    labels = cluster(points(), 3, seed=5)
    assert labels.tolist() == [1] * 4 + [0] * 6 + [2] * 2


def test_the_same_seed_gives_the_same_clusters():
    cloud = np.random.default_rng(1).normal(size=(60, 5))
    first = cluster(cloud, 7, seed=3)
    np.testing.assert_array_equal(first, cluster(cloud, 7, seed=3))
    assert set(first) == set(range(7))
    sizes = np.bincount(first)
    assert np.all(np.diff(sizes) <= 0)


def test_every_point_can_be_a_cluster_of_its_own():
    assert sorted(cluster(points(), 12, seed=0)) == list(range(12))


def test_what_cannot_be_clustered_is_named():
    with pytest.raises(ValueError, match="4 clusters of 3 different embeddings; wanted 1 to 3"):
        cluster(BLOBS, 4, seed=0)
    with pytest.raises(ValueError, match="0 clusters"):
        cluster(BLOBS, 0, seed=0)
    broken = points()
    broken[7, 1] = np.nan
    with pytest.raises(ValueError, match="the embedding of text 7 is not finite"):
        cluster(broken, 2, seed=0)


def test_directions_leave_out_what_all_have_in_common():
    x = np.array([[101.0, 100.0], [100.0, 102.0], [99.0, 98.0], [100.0, 100.0]])
    np.testing.assert_allclose(
        directions(x), [[1, 0], [0, 1], [-(0.2**0.5), -2 * 0.2**0.5], [0, 0]], atol=1e-9
    )


def test_the_best_of_each_cluster_are_kept_in_their_order():
    labels = np.array([0, 1, 0, 0, 1, 2, 0])
    scores = np.array([1.0, 5.0, 3.0, 3.0, 4.0, -7.0, 9.0])
    assert best_of_clusters(labels, scores, 2).tolist() == [1, 2, 4, 5, 6]  # of equal the earlier
    assert best_of_clusters(labels, scores, 1).tolist() == [1, 5, 6]
    assert best_of_clusters(labels, scores, 9).tolist() == list(range(7))
    assert best_of_clusters(labels, scores, 2, above=3.0).tolist() == [1, 4, 6]
    scores[4] = np.inf
    with pytest.raises(ValueError, match="the score of text 4 is inf; wanted a finite"):
        best_of_clusters(labels, scores, 1)
