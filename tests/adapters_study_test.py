"""Adapters reach what full training reaches, with a fraction of the optimizer's state."""

import pytest

from benchmarks.adapters import Result, page, study


@pytest.mark.slow
def test_rank_4_is_as_good_as_all_weights(tmp_path):
    """A-PE-3 and A-PE-5 of methods on PE-RLHF (https://arxiv.org/abs/2403.10704)."""
    results = study(tmp_path)
    full, low = results["all weights"], results["rank 4"]
    assert full.accuracy > 0.8
    assert low.accuracy >= full.accuracy - 0.03
    assert low.optimizer_bytes < 0.8 * full.optimizer_bytes


def test_the_page_has_the_ratios():
    results = {"all weights": Result(0.9, 0.75, 1000, 8000), "rank 4": Result(0.9, 0.75, 100, 800)}
    text = page(results, "the command")
    assert "| accuracy on held-out pairs | 0.750 | 0.750 | 1.000 |" in text
    assert "| bytes of optimizer state | 8000 | 800 | 0.100 |" in text
