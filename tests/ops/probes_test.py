"""Numbers of probes: by hand, against a slow reference, and by what must not change them."""

import numpy as np
import pytest

from rlhf_jax.ops import probes

T1 = 12.706204736  # of Student with one degree of freedom, 95 %
RNG = np.random.default_rng(0)


def test_a_mean_effect_counts_prompts_not_texts():
    """Prompts of means 1 and 3: mean 2, s = √2, reach t₁ · √2 / √2."""
    found = probes.mean_effect(np.float64([0, 2, 3]), np.array([5, 5, 9]))
    assert (found.value, found.prompts) == (2.0, 2)
    np.testing.assert_allclose((found.low, found.high), (2 - T1, 2 + T1))
    with pytest.raises(ValueError, match="1 prompts have no interval"):
        probes.mean_effect(np.float64([1, 2]), np.array([0, 0]))


def test_a_slope_within_groups_by_hand():
    """Offsets of 0 and 10, slopes of 2 and 1: x = ±1, ±2; b = (1·2·2 + 4·2·1) / (2 + 8) = 1.2."""
    lengths, groups = np.array([1, 3, 0, 4]), np.array([0, 0, 1, 1])
    found = probes.within_slope(np.float64([0, 4, 10, 14]), lengths, groups)
    assert found.value == pytest.approx(1.2) and found.prompts == 2
    # Σ_g (Σ x e)²: 2·0.8 = 1.6 and 8·(−0.2) = −1.6; √(2 · 2 · 1.6²) / 10
    assert found.high - found.value == pytest.approx(T1 * 0.32)


def test_a_slope_is_least_squares_with_a_constant_for_each_group():
    groups = np.repeat(np.arange(20), 4)
    lengths = RNG.integers(1, 50, 80)
    scores = 0.3 * lengths + 5 * RNG.normal(size=20)[groups] + RNG.normal(size=80)
    design = np.column_stack([lengths, np.eye(20)[groups]])
    wanted = np.linalg.lstsq(design, scores, rcond=None)[0][0]
    found = probes.within_slope(scores, lengths, groups)
    assert found.value == pytest.approx(wanted, rel=1e-9)
    shifted = probes.within_slope(scores + 7 * groups, lengths + groups, groups)
    assert shifted.value == pytest.approx(found.value) and found.low < 0.3 < found.high
    with pytest.raises(ValueError, match="all lengths are equal"):
        probes.within_slope(scores, np.ones(80, int), groups)
    with pytest.raises(ValueError, match="1 prompts have no interval"):
        probes.within_slope(scores, lengths, np.zeros(80, int))


def test_a_slope_over_pairs_has_a_constant_for_quality():
    further = RNG.integers(-20, 20, 200)
    gaps = 3.0 + 0.25 * further + RNG.normal(size=200)
    wanted = np.linalg.lstsq(np.column_stack([further, np.ones(200)]), gaps, rcond=None)[0][0]
    found = probes.pair_slope(gaps, further, np.arange(200))
    assert found.value == pytest.approx(wanted, rel=1e-9)
    assert found.low < 0.25 < found.high


def test_intervals_hold_what_they_say():
    """95 % of 400 studies of 30 groups, up to three standard errors (and few groups: 90 %)."""
    rng, inside = np.random.default_rng(1), 0
    groups = np.repeat(np.arange(30), 4)
    for _ in range(400):
        lengths = rng.integers(0, 30, 120)
        # One error for each length of a group's own slope: errors hang together.
        scores = (0.2 + 0.1 * rng.normal(size=30))[groups] * lengths + rng.normal(size=120)
        found = probes.within_slope(scores, lengths, groups)
        inside += found.low <= 0.2 <= found.high
    assert 0.90 <= inside / 400 <= 0.985


def test_a_preference_is_kept_turned_or_tied():
    before, after = np.float64([1, -2, 3, 0, 1]), np.float64([2, -1, -3, 5, 0])
    found = probes.kept_preference(before, after, np.arange(5))
    assert found.value == (1 + 1 + 0 + 0.5) / 4 and found.prompts == 4
    assert 0 <= found.low < found.value < found.high <= 1
    with pytest.raises(ValueError, match="all pairs have equal scores"):
        probes.kept_preference(np.zeros(2), np.ones(2), np.arange(2))


def test_the_offset_of_prompts_by_hand():
    """Means 1 and 5, within 2: MS between 16, so (16 − 2) / 2 = 7 of 9."""
    found = probes.prompt_offset(np.float64([0, 2, 4, 6, 9]), np.array([0, 0, 1, 1, 2]))
    assert (found.between, found.within) == (7.0, 2.0)
    assert found.share.value == pytest.approx(7 / 9) and found.share.prompts == 2
    with pytest.raises(ValueError, match="1 prompts have two texts"):
        probes.prompt_offset(np.float64([0, 2, 4]), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="all scores are equal"):
        probes.prompt_offset(np.zeros(4), np.array([0, 0, 1, 1]))


def test_the_offset_has_the_right_mean():
    """σ_b² = 4, σ_w² = 1, prompts of 2 to 4 texts: means over 300 draws within 3 standard errors;
    without offsets the variance between is 0 in the mean, and its share is never below 0."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(12), rng.integers(2, 5, 12))
    found, none = [], []
    for _ in range(300):
        noise = rng.normal(size=len(groups))
        offset = 2 * rng.normal(size=12)[groups]
        found.append(probes.prompt_offset(noise + offset, groups, resamples=2))
        none.append(probes.prompt_offset(noise, groups, resamples=2))
    for values, wanted in (
        ([one.between for one in found], 4.0),
        ([one.within for one in found], 1.0),
        ([one.between for one in none], 0.0),
    ):
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - wanted) < 3 * error
    assert min(one.share.value for one in none) == 0.0
    whole = probes.prompt_offset(noise + offset, groups)
    assert whole.share.low <= whole.share.value <= whole.share.high
