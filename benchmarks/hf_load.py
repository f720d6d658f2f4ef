"""Loading a Hugging Face folder, ours beside transformers': seconds and host memory, one JSON line.

    python -m benchmarks.hf_load --repeats=5

Makes a folder of random weights (Qwen2.5-0.5B's shape, bfloat16), then loads it in processes of
their own, turn by turn. A run's seconds are those of the load and of reading every weight once
(a sum of all bits, which must be the same); imports and start-up of the devices are not counted.
Memory is anonymous host memory at its peak, less what it was before and less the weights
themselves, in units of the largest tensor. All runs read files that the system has cached.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers

from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.load import load_hf

SIDES = ("ours", "transformers")
SHAPE = dict(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4_864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def make_folder(folder: pathlib.Path, layers: int) -> None:
    """Random weights, written by transformers."""
    config = transformers.Qwen2Config(**SHAPE | dict(num_hidden_layers=layers))
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def anonymous_bytes() -> int:
    """What this process holds in memory that no file backs."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this needs Linux")


def bits(array: np.ndarray) -> int:
    """The sum of an array's bits as whole numbers, whatever the order."""
    return int(array.reshape(-1).view(f"u{array.dtype.itemsize}").sum(dtype=np.uint64))


def load_ours(folder: pathlib.Path) -> Callable[[], list[np.ndarray]]:
    """The leaves as host arrays that share the devices' memory."""
    mesh = make_mesh({"data": -1})

    def load():
        _, params = load_hf(folder, mesh, ShardingRules(), overrides={"param_dtype": "bfloat16"})
        return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]

    return load


def load_theirs(folder: pathlib.Path) -> Callable[[], list[np.ndarray]]:
    """The parameters as host arrays that share torch's memory."""

    def load():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        return [p.detach().view(torch.int16).numpy() for p in model.parameters()]

    return load


def measure(load: Callable[[], list[np.ndarray]]) -> dict[str, Any]:
    """Seconds, checksum, and peak memory of one load."""
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    before = anonymous_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    leaves = load()
    checksum = sum(map(bits, leaves)) % 2**64
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in leaves)
    return dict(seconds=seconds, checksum=checksum, bytes=size, above=peak[0] - before - size)


def run_one(side: str, folder: pathlib.Path) -> dict[str, Any]:
    """One load in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hf_load", f"--one={side}", f"--folder={folder}"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def compare(folder: pathlib.Path, repeats: int) -> dict[str, Any]:
    """Both sides turn by turn; the ratio of the fastest runs and of the medians."""
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            runs[side].append(run_one(side, folder))
    sums = {run["checksum"] for each in runs.values() for run in each}
    if len(sums) != 1:
        raise RuntimeError(f"the checksums differ: {sorted(sums)}")
    seconds = {side: [run["seconds"] for run in each] for side, each in runs.items()}
    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2
    above = {side: max(run["above"] for run in each) / largest for side, each in runs.items()}
    return dict(
        gigabytes=runs["ours"][0]["bytes"] / 1e9,
        repeats=repeats,
        fastest=min(seconds["ours"]) / min(seconds["transformers"]),
        median=float(np.median(seconds["ours"]) / np.median(seconds["transformers"])),
        memory={side: round(value, 2) for side, value in above.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--one", choices=SIDES, help="one load of --folder")
    parser.add_argument("--folder", type=pathlib.Path, help="a folder to load instead of a new one")
    args = parser.parse_args()
    if args.one:
        load = {"ours": load_ours, "transformers": load_theirs}[args.one](args.folder)
        print(json.dumps(measure(load)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or pathlib.Path(scratch) / "model"
        if not args.folder:
            make_folder(folder, args.layers)
        print(json.dumps(compare(folder, args.repeats)))


if __name__ == "__main__":
    main()
