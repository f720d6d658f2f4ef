"""Groups and chunks: whole groups, exact inverses, statistics against loops."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.mesh import make_mesh
from rlhf_jax.ops import groups

X = np.array([1.0, 2.0, 6.0, -0.5, 0.25, 0.25], np.float32)


def test_split_is_strided_by_group():
    rows = np.arange(12)
    np.testing.assert_array_equal(
        groups.split_chunks(rows, 3, 2), [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    )
    np.testing.assert_array_equal(groups.split_chunks(rows[:6], 3), [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize(("chunks", "group"), [(1, 1), (3, 1), (1, 4), (3, 4), (2, 2), (6, 4)])
def test_join_undoes_split(chunks, group):
    tree = {"a": np.arange(24), "b": np.arange(24 * 6).reshape(24, 2, 3), "none": None}
    split = groups.split_chunks(tree, chunks, group)
    assert split["a"].shape == (chunks, 24 // chunks)
    assert split["b"].shape == (chunks, 24 // chunks, 2, 3)
    joined = groups.join_chunks(split, group)
    assert joined["none"] is None
    np.testing.assert_array_equal(joined["a"], tree["a"])
    np.testing.assert_array_equal(joined["b"], tree["b"])


def test_chunks_of_prompts_match_chunks_of_rollouts():
    prompts, samples = 8, 3
    of_rollouts = groups.split_chunks(np.repeat(np.arange(prompts), samples), 4, samples)
    of_prompts = groups.split_chunks(np.arange(prompts), 4)
    for j in range(4):
        np.testing.assert_array_equal(of_rollouts[j], np.repeat(of_prompts[j], samples))


def test_a_split_that_cuts_groups_is_refused():
    with pytest.raises(ValueError, match="12 rows do not split into 5 chunks of whole groups of 2"):
        groups.split_chunks(np.arange(12), 5, 2)
    with pytest.raises(ValueError, match="whole groups of 5"):
        groups.join_chunks(np.zeros((3, 4)), 5)
    with pytest.raises(ValueError, match="whole groups of 4"):
        groups.group_mean(X, 4)


def test_splitting_sharded_rows_moves_nothing():
    mesh = make_mesh({"data": 4})
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    inner = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    x = jax.device_put(jnp.arange(32.0), rows)
    split = jax.jit(lambda x: groups.split_chunks(x, 2, 2), out_shardings=inner)
    text = split.lower(x).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text
    np.testing.assert_array_equal(split(x), groups.split_chunks(np.arange(32.0), 2, 2))


def test_statistics_against_python():
    for start in (0, 3):
        group = [float(v) for v in X[start : start + 3]]
        mean, std = statistics.fmean(group), statistics.pstdev(group)
        rows = slice(start, start + 3)
        np.testing.assert_allclose(groups.group_mean(X, 3)[rows], mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(groups.group_std(X, 3)[rows], std, rtol=1e-6)
        wanted = [(v - mean) / (std + 1e-6) for v in group]
        np.testing.assert_allclose(groups.group_zscore(X, 3)[rows], wanted, rtol=1e-5)
        for i, v in enumerate(group):
            others = statistics.fmean(group[:i] + group[i + 1 :])
            found = groups.leave_one_out(X, 3)[start + i]
            np.testing.assert_allclose(found, v - others, rtol=1e-6, atol=1e-7)


def test_leave_one_out_is_a_scaled_centring():
    centred = X - groups.group_mean(X, 3)
    np.testing.assert_allclose(groups.leave_one_out(X, 3), 1.5 * centred, rtol=1e-6)
    with pytest.raises(ValueError, match="groups of 2 or more"):
        groups.leave_one_out(X, 1)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e-30])
def test_equal_scores_give_exactly_zero(value):
    x = jnp.full(6, value, jnp.float32)  # a plain mean of three 0.1 is not 0.1
    np.testing.assert_array_equal(groups.group_mean(x, 3), x)
    for statistic in (groups.group_zscore, groups.group_std, groups.leave_one_out):
        np.testing.assert_array_equal(statistic(x, 3), 0)
    for statistic in (groups.group_zscore, groups.group_std):
        gradient = jax.grad(lambda x, f=statistic: jnp.sum(f(x, 3)))(x)
        assert np.all(np.isfinite(gradient))


def test_groups_of_one_have_no_spread():
    np.testing.assert_array_equal(groups.group_zscore(X, 1), 0)
    np.testing.assert_array_equal(groups.group_mean(X, 1), X)


def test_spread_scales_out():
    narrow, wide = groups.group_zscore(0.1 * X, 3), groups.group_zscore(10 * X, 3)
    np.testing.assert_allclose(narrow, wide, rtol=1e-4)


def test_best_and_worst_take_the_first_of_equal_ones():
    x = np.array([1, 3, 3, 0, 0, 5, 2, 2, 2], np.float32)
    best, worst = groups.best_of_group(x, 3), groups.worst_of_group(x, 3)
    assert best.dtype == worst.dtype == bool
    np.testing.assert_array_equal(best, np.array([0, 1, 0, 0, 0, 1, 1, 0, 0], bool))
    np.testing.assert_array_equal(worst, np.array([1, 0, 0, 1, 0, 0, 1, 0, 0], bool))


def test_repeat_groups_keeps_samples_together():
    x = np.array([[1, 2], [3, 4]])
    np.testing.assert_array_equal(groups.repeat_groups(x, 2), [[1, 2], [1, 2], [3, 4], [3, 4]])


def test_shuffling_groups_shuffles_statistics():
    order = np.array([1, 0])
    rows = np.concatenate([np.arange(3) + 3 * g for g in order])
    for statistic in (groups.group_zscore, groups.leave_one_out, groups.best_of_group):
        np.testing.assert_array_equal(statistic(X[rows], 3), np.asarray(statistic(X, 3))[rows])


def test_masked_statistics_against_python():
    """Ragged groups, NaN outside, one group without an entry, one with a single entry."""
    rng = np.random.default_rng(0)
    mask = rng.random((8, 5)) < 0.5
    mask[4:6], mask[6:] = False, False
    mask[7, 2] = True
    x = np.where(mask, rng.normal(size=mask.shape), np.nan).astype(np.float32)
    mean, std = groups.masked_group_stats(x, mask, 2)
    assert mean.shape == std.shape == x.shape
    for first in range(0, 8, 2):
        rows = slice(first, first + 2)
        entries = [float(v) for v in x[rows][mask[rows]]]
        wanted = (statistics.fmean(entries), statistics.pstdev(entries)) if entries else (0, 0)
        for found, number in zip((mean, std), wanted, strict=True):
            np.testing.assert_allclose(found[rows], number, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="8 rows are not whole groups of 3"):
        groups.masked_group_stats(x, mask, 3)


def test_masked_statistics_of_full_rows_are_those_of_groups():
    mean, std = groups.masked_group_stats(X[:, None], np.ones((6, 1), bool), 3)
    np.testing.assert_allclose(mean[:, 0], groups.group_mean(X, 3), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(std[:, 0], groups.group_std(X, 3), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_masked_statistics_of_equal_entries_are_exact(value):
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    x = np.where(mask, value, np.nan).astype(np.float32)
    mean, std = groups.masked_group_stats(x, mask, 3)
    np.testing.assert_array_equal(mean, np.float32(value))
    np.testing.assert_array_equal(std, 0)
    gradient = jax.grad(lambda x: jnp.sum(groups.masked_group_stats(x, mask, 3)[1]))(jnp.asarray(x))
    assert np.all(np.isfinite(gradient))
