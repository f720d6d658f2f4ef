"""What workloads A to D are, their command line, their clock, and the one JSON line of each.

    python benchmarks/workload_d.py --reps=3

    A  rollout             16 prompts of 64 tokens, 128 sampled at temperature 1
    B  GRPO step           4 prompts x 8 samples, 64 + 128 tokens, beta 0.04, one update
    C  PPO step            32 prompts, 64 + 128 tokens, a learned reward and a value model, beta
                           0.04, one update of both
    D  reward-model step   8 pairs, 16 texts of 256 tokens, one update

No token ends a text; updates are AdamW with a clip of the gradient's norm, products are not
recomputed; all in float32. The model has 27 million parameters (Qwen3's layout, 8 layers of width
512).

``--workdir``, or PEER_BENCH_WORKDIR, is a folder of ``model/``, ``reward/`` and ``value/`` (Hugging
Face folders; the latter two score), ``prompts.json`` ([{text, ids}]) and ``pairs.json``
([{chosen: {text, ids}, rejected: ...}]): so programs of other origin are measured on the same
weights and texts. Without one the workload makes such a folder of random weights and words.

They run on the CPU unless JAX_PLATFORMS says otherwise. With ``--threads=1`` the process is pinned
to one core; then CPU seconds are the figure that other work on the machine disturbs least. Steps
are whole: from one request for data to the next.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

NAMES = {"A": "rollout", "B": "grpo_step", "C": "ppo_step", "D": "reward_model_step"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers")


class Size(NamedTuple):
    """N prompts (or pairs) of K samples (or sides); tokens of a prompt (or side), of a sample."""

    prompts: int
    samples: int
    prompt: int
    completion: int


SIZES = {"A": Size(16, 1, 64, 128), "B": Size(4, 8, 64, 128), "C": Size(32, 1, 64, 128),
         "D": Size(8, 2, 256, 0)}  # fmt: skip
SMALL_SIZES = {"A": Size(4, 1, 6, 4), "B": Size(4, 2, 6, 4), "C": Size(4, 1, 6, 4),
               "D": Size(4, 2, 8, 0)}  # fmt: skip
LEARNING_RATE = 1e-5
KL_COEF = 0.04
MESH = dict(data=-1, fsdp=1, tensor=1)  # -1: all devices, of which a CPU is one
LAYER_CHUNK = 1536  # tokens: of these models what one core's cache holds


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line. ``variant`` is repeated in the line: there is one variant, "default"."""

    letters: tuple[str, ...]
    reps: int
    warmup: int
    threads: int
    workdir: str
    variant: str
    small: bool

    @property
    def steps(self) -> int:
        """The first one, which compiles, those that warm up, and those that count."""
        return 1 + self.warmup + self.reps

    def size(self, letter: str) -> Size:
        return (SMALL_SIZES if self.small else SIZES)[letter]


def parse(letter: str, arguments: list[str] | None = None) -> Options:
    """The command line of one workload's file, which runs the others too where they are named."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--workload", default=letter, help="A, B, C or D; several: A,B")
    parser.add_argument("--reps", type=int, default=5, help="steps that count")
    parser.add_argument("--warmup", type=int, default=1, help="steps between the first and those")
    parser.add_argument("--threads", type=int, default=1, help="1: pinned to one core")
    parser.add_argument("--workdir", default=os.environ.get("PEER_BENCH_WORKDIR", ""))
    parser.add_argument("--variant", default="default", choices=("default",))
    parser.add_argument("--small", action="store_true", help="shrunken shapes, for tests")
    given = parser.parse_args(arguments)
    letters = tuple(given.workload.split(","))
    unknown = [each for each in letters if each not in NAMES]
    if unknown:
        parser.error(f"--workload={given.workload}: {unknown[0]!r} is none of {', '.join(NAMES)}")
    if given.reps < 1 or given.warmup < 0 or given.threads < 1:
        parser.error("wanted --reps of 1 or more, --warmup of 0 or more, --threads of 1 or more")
    return Options(letters, given.reps, given.warmup, given.threads, given.workdir, given.variant,
                   given.small)  # fmt: skip


def process_seconds() -> float:
    """Seconds since this process began."""
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


class Clock:
    """Wall and CPU seconds of set-up and steps, and the line that says them."""

    def __init__(self, letter: str, options: Options, import_seconds: float):
        self._letter, self._options, self._import = letter, options, import_seconds
        self._load = os.getloadavg()[0]
        self._began = time.perf_counter()
        self._setup = 0.0
        self._mark = (0.0, 0.0)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def ready(self) -> None:
        """Models and data are there: the first step begins."""
        self._setup = time.perf_counter() - self._began
        self._mark = (time.perf_counter(), time.process_time())

    def tick(self) -> None:
        """A step's results are there: the next one begins."""
        now = (time.perf_counter(), time.process_time())
        self.wall.append(now[0] - self._mark[0])
        self.cpu.append(now[1] - self._mark[1])
        self._mark = now

    def line(self, tokens: int, extra: dict[str, Any]) -> dict[str, Any]:
        """What was measured.

        Args:
            tokens: sampled, or trained on, in a step.
        """
        options, setup = self._options, self._setup
        wall, cpu = (each[1 + options.warmup :] for each in (self.wall, self.cpu))
        median = statistics.median(wall)
        versions = {name: version(name) for name in PACKAGES}
        return {
            "contender": "rlhf_jax",
            "workload": self._letter,
            "name": NAMES[self._letter],
            "variant": options.variant,
            "versions": versions | {"python": platform.python_version()},
            "threads": options.threads,
            "import_s": round(self._import, 3),
            "load_before": self._load,
            "setup_s": round(setup, 3),
            "status": "ok",
            "first_step_s": round(self.wall[0], 3),
            "time_to_first_step_s": round(self._import + setup + self.wall[0], 3),
            "reps_s": [round(seconds, 4) for seconds in wall],
            "median_s": round(median, 4),
            "min_s": round(min(wall), 4),
            "max_s": round(max(wall), 4),
            "cpu_s": [round(seconds, 4) for seconds in cpu],
            "cpu_median_s": round(statistics.median(cpu), 4),
            "tokens_per_step": tokens,
            "tokens_per_s": round(tokens / median, 1),
            "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "load_after": os.getloadavg()[0],
            "extra": {"small": options.small, **extra},
        }


@contextlib.contextmanager
def assets(options: Options) -> Iterator[pathlib.Path]:
    """The folder that was named, or one that is made and removed."""
    if options.workdir:
        folder = pathlib.Path(options.workdir)
        if not (folder / "prompts.json").is_file():
            raise ValueError(
                f"--workdir={folder} has no prompts.json; wanted a folder of model/, reward/, "
                "value/, prompts.json and pairs.json, or none, to make one"
            )
        yield folder
        return
    # Here, as everything that imports jax: processes are pinned first.
    from benchmarks.workload_assets import make

    with tempfile.TemporaryDirectory() as scratch:
        make(pathlib.Path(scratch), options)
        yield pathlib.Path(scratch)


def measure(
    letter: str,
    options: Options,
    folder: pathlib.Path,
    scratch: pathlib.Path,
    import_seconds: float,
) -> dict[str, Any]:
    """One workload in this process, and then the machine's ceilings; the line."""
    module = importlib.import_module(f"benchmarks.workload_{letter.lower()}")
    ceilings = importlib.import_module("benchmarks.ceilings")
    clock = Clock(letter, options, import_seconds)
    tokens, extra = module.run(clock, options, folder, scratch)
    line = clock.line(tokens, extra)
    # Small ones whatever the workload's size: large ones take longer than it does.
    return line | {"ceilings": ceilings.measure(small=True)}


def main(letter: str, arguments: list[str] | None = None) -> None:
    """Measures what the command line names; a JSON line each on stdout, all else on stderr."""
    options = parse(letter, arguments)
    if options.threads == 1:  # XLA makes a pool of as many threads as there are cores to run on
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import jax

    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # what the others are measured on
    from rlhf_jax import host_memory

    host_memory.one_heap()  # as the programs do
    import_seconds = process_seconds()
    with (
        contextlib.redirect_stdout(sys.stderr),
        assets(options) as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):
        lines = [
            measure(each, options, folder, pathlib.Path(scratch), import_seconds)
            for each in options.letters
        ]
    for line in lines:
        print(json.dumps(line))
