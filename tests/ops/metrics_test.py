"""Totals and counts: exact under addition."""

import math

import jax.numpy as jnp
import numpy as np

from rlhf_jax.ops import metrics
from rlhf_jax.types import Mean


def mean(total, count):
    return Mean(total=jnp.float32(total), count=jnp.float32(count))


def test_add_weighs_by_count_and_takes_the_union():
    a = {"loss": mean(3.0, 1), "only_a": mean(1.0, 1)}
    b = {"loss": mean(1.0, 3), "only_b": mean(5.0, 2)}
    total = metrics.values(metrics.add(a, b))
    assert sorted(total) == ["loss", "only_a", "only_b"]
    assert float(total["loss"]) == 1.0  # the mean of means would be 1.67
    assert float(total["only_b"]) == 2.5
    assert float(a["loss"].total) == 3.0  # the arguments are left alone


def test_an_empty_mean_is_nan_and_adds_nothing():
    empty, full = {"x": mean(0.0, 0)}, {"x": mean(2.0, 4)}
    assert math.isnan(metrics.value(empty["x"]))
    assert float(metrics.value(metrics.add(empty, full)["x"])) == 0.5
    on_host = Mean(total=np.zeros((), np.float32), count=np.zeros((), np.float32))
    assert math.isnan(metrics.value(on_host))  # and no warning of division


def test_scale_single_and_names():
    assert float(metrics.value(metrics.scale(mean(3.0, 2), 4.0))) == 6.0
    assert float(metrics.value(metrics.single(0.25))) == 0.25
    named = metrics.with_prefix("policy", {"b": mean(1, 1), "a": mean(1, 1)})
    named["value/error"] = mean(1, 1)
    assert metrics.names(named) == ["policy/a", "policy/b", "value/error"]
    assert metrics.names(named, "policy/") == ["policy/a", "policy/b"]
