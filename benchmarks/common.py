"""What the workloads share: the 0.5B shape and its shrunken twin, timing, the JSON line."""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.models.config import ModelConfig, named_size

_SMALL = dict(vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_width=128)


def parse_small(description: str) -> bool:
    """Whether the command line says --small: shapes and type that a CPU does in seconds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="shrunken shapes, float32 (CPU)")
    return parser.parse_args().small


def compute_dtype(small: bool) -> str:
    """bfloat16, which accelerators are made for; float32 where the CPU stands in for one."""
    return "float32" if small else "bfloat16"


def model_config(small: bool, **overrides) -> ModelConfig:
    """The 0.5B shape with float32 parameters, as a policy is trained."""
    shape = _SMALL if small else {}
    return named_size("0.5b", **shape, compute_dtype=compute_dtype(small), **overrides)


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median wall time of ``run()`` to its finished result, after one call that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_gib() -> float | None:
    """The most device memory in use so far in GiB; None where the device does not tell."""
    stats = jax.local_devices()[0].memory_stats()
    return round(stats["peak_bytes_in_use"] / 2**30, 2) if stats else None


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def report(name: str, small: bool, figures: dict[str, Any]) -> dict[str, Any]:
    """Prints the workload's one JSON line and returns what it says."""
    line = {
        "benchmark": name,
        "small": small,
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax")},
        },
        "figures": figures,
    }
    print(json.dumps(line))
    return line
