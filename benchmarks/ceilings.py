"""The two rates everything else is measured against: memory copy and matrix product.

python -m benchmarks.ceilings [--small]
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import compute_dtype, parse_small, report, rounded


def _chain_seconds(step, x, calls: int) -> float:
    """Seconds per call of x = step(x), best of three chains; dispatch overlaps execution."""
    x = jax.block_until_ready(step(x))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            x = step(x)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def copy_rate(small: bool) -> float:
    """Bytes per second, read and written both counted, of adding 1 to a large float32 array."""
    size = 2**24 if small else 2**30  # 64 MiB, 4 GiB: far larger than any cache
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = _chain_seconds(step, jnp.zeros(size, jnp.float32), 3 if small else 10)
    return 2 * 4 * size / seconds


def matmul_rate(small: bool) -> float:
    """FLOP per second of an [n n] by [n n] product of random numbers (zeros run faster)."""
    n = 1024 if small else 8192
    dtype = compute_dtype(small)
    x, w = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))

    @functools.partial(jax.jit, static_argnames="scale")
    def step(x, w, scale):
        return (x @ w) * scale  # keeps the chain's values at their size

    seconds = _chain_seconds(lambda x: step(x, w, n**-0.5), x, 3 if small else 20)
    return 2 * n**3 / seconds


def measure(small: bool) -> dict[str, Any]:
    """Both ceilings: GB/s and TFLOP/s."""
    return {
        "copy_gb_per_s": rounded(copy_rate(small) / 1e9),
        "matmul_tflop_per_s": rounded(matmul_rate(small) / 1e12),
        "matmul_dtype": compute_dtype(small),
    }


if __name__ == "__main__":
    small = parse_small(__doc__)
    report("ceilings", small, measure(small))
