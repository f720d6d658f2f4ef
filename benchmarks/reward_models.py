"""Reward models on real data beside length and majority baselines, and the page of what came out.

    python -m benchmarks.reward_models --workdir=runs/reward_models [--data=../shared/data]

Outcome models learn from human pairs (UKPConvArg1, HH-RLHF) and from right and wrong solutions
(GSM8K), process models from step labels (PRMBench, BIG-Bench Mistake); all are small, start from
random weights and are tested on topics, dialogues and questions that they have not seen, process
models on ProcessBench too. Three seeds each; two sets in several sizes of the training data. Then
`rlhf_jax.evaluate` is run as a user would on RM-Bench and ProcessBench. Every run is a pipeline of
`train_reward` and `evaluate_reward`; one that is done is not run again and one that was stopped
goes on, so the command can be repeated. It ends by writing the page and its figure. At most an hour
on two cores. ``--small`` shortens every part, for tests.
"""

import argparse
import contextlib
import json
import logging
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from benchmarks import reward_models_data, reward_models_page
from benchmarks.reward_models_sources import LICENCE, LIMITS, PROVENANCE
from configs import eval_reward
from rlhf_jax.data.sources import read_jsonl
from rlhf_jax.label_samples import write_lines
from rlhf_jax.pipeline import pipeline
from rlhf_jax.program import set_up

DATA = pathlib.Path("../shared/data")
SEEDS = (0, 1, 2)
_log = logging.getLogger("rlhf_jax.benchmarks.reward_models")


class Recipe(NamedTuple):
    """How a set is learnt and tested.

    Attributes:
        kind: of its records in training.
        form: of its held-out parts.
        length, rows, steps, rate, decay: tokens of a text, records of a step, and so on.
        sizes: records of training; 0: all.
        model: fields of the model in place of the size "tiny"'s.
        template: the prompt's text.
        options: of the training source.
        longest: tokens of texts in tests, in place of `length`.
    """

    kind: str
    form: str
    length: int
    rows: int
    steps: int
    rate: float
    decay: float
    sizes: tuple[int, ...] = (0,)
    model: Mapping[str, Any] = {}
    template: str = "{prompt}\n"
    options: Mapping[str, Any] = {}
    longest: int = 0

    @property
    def head(self) -> str:
        """What judges: the last token of a text, or the end of each step."""
        return "process" if self.kind == "steps" else "outcome"


_HEADS = dict(heads=2, kv_heads=2, head_dim=32)
_ONE_LAYER = dict(layers=1, **_HEADS)
RECIPES = {
    "ukp": Recipe(
        "pairs", "pairs", 192, 16, 300, 3e-3, 1.0, sizes=(450, 900, 1800, 3600, 0),
        model=_ONE_LAYER, longest=320,
    ),
    "gsm8k": Recipe(
        "correctness", "samples", 320, 32, 80, 1e-3, 1.0, sizes=(240, 480, 960, 0),
        model=_ONE_LAYER, longest=512,
    ),
    "hh": Recipe(
        "pairs", "pairs", 320, 16, 150, 1e-3, 0.1, template="{prompt}",
        options=dict(format="dialogue"), model=_ONE_LAYER, longest=768,
    ),
    "prmbench": Recipe(
        "steps", "prmbench", 512, 16, 200, 3e-3, 0.1, model=_HEADS, longest=1024,
    ),
    "bigbench_mistake": Recipe(
        "steps", "bigbench_mistake", 512, 16, 200, 3e-3, 0.1, model=_HEADS, longest=1024,
    ),
}  # fmt: skip


class Place(NamedTuple):
    """Where data is read and results are written, and whether everything is shortened."""

    data: pathlib.Path
    workdir: pathlib.Path
    small: bool

    @property
    def files(self) -> pathlib.Path:
        """What `reward_models_data` writes."""
        return self.workdir / "data"


class Run(NamedTuple):
    """One model: set, records of training (0: all), seed."""

    name: str
    size: int
    seed: int

    def folder(self, place: Place) -> pathlib.Path:
        """The pipeline's folder."""
        return place.workdir / f"{self.name}_{self.size or 'all'}_{self.seed}"


def sizes_of(name: str, small: bool) -> tuple[int, ...]:
    """The sizes of a set in rising order, the whole set last."""
    sizes = RECIPES[name].sizes
    return (24, 0) if small and len(sizes) > 1 else sizes


def runs_of(seeds: Sequence[int], small: bool) -> list[Run]:
    """What there is to run, in order: whole sets first, then the smaller sizes."""
    every = [
        Run(name, size, seed)
        for name in RECIPES
        for size in sizes_of(name, small)
        for seed in seeds
    ]
    return sorted(every, key=lambda run: run.size > 0)


def training(place: Place, run: Run, recipe: Recipe, source: pathlib.Path) -> dict:
    """The stage that trains."""
    steps, rows = (2, 4) if place.small else (recipe.steps, recipe.rows)
    section = dict(
        kind=recipe.kind,
        name=f"jsonl:{source}",
        split="all",
        template=recipe.template,
        max_length=recipe.length,
        overlong="skip",
        weight=1.0,
        rows=rows,
    )
    if recipe.options:
        section["options"] = dict(recipe.options)
    return dict(
        seed=run.seed,
        mesh=dict(data=-1, fsdp=1, tensor=1),
        model=dict(name="tiny", init_from="", **recipe.model),
        reward=dict(score_heads=(recipe.head,)),
        data=dict(tokenizer=str(place.files / "tokenizer.json")),
        sources={run.name: section},
        optimizer=dict(
            learning_rate=recipe.rate,
            schedule="cosine",
            warmup=steps // 10,
            eps=1e-5,
            weight_decay=recipe.decay,
        ),
        updates=dict(microbatches=1),
        train=dict(steps=steps, max_skipped=3),
        eval=dict(every=1_000_000, sources=dict()),
        card=dict(
            sources={run.name: dict(PROVENANCE[run.name])},
            licence=LICENCE,
            limits=LIMITS,
            probes=dict(records=4 if place.small else 16),
        ),
        checkpoint=dict(every=1_000_000, keep=1),
        log=dict(every=50),
    )


def report(place: Place, run: Run, recipe: Recipe) -> ConfigDict:
    """The stage that measures: configs/eval_reward.py with the study's own files."""
    longest = recipe.longest or recipe.length
    config = eval_reward.get_config(f"model={{workdir}}/reward,max_length={longest},rows=16")
    config.data.template = recipe.template
    if place.small:
        config.resamples = 20
    process = recipe.head == "process"
    for part in ("dev", "test") if process else ("test",):
        file = place.files / f"{run.name}_{part}.jsonl"
        config.reward_sets[part] = dict(form=recipe.form, name=f"jsonl:{file}")
    if process:
        config.reward.threshold_from = "dev"
        for path in reward_models_data.processbench(place.data):
            label, limit = path.name.removesuffix(".jsonl.gz"), 8 if place.small else 200
            set_ = dict(form="processbench", name=f"jsonl:{path}", limit=limit)
            config.reward_sets[label] = set_
    return config


def config_of(place: Place, run: Run) -> ConfigDict:
    """The pipeline of one run; writes the draw of a smaller size beside it."""
    recipe = RECIPES[run.name]
    source = place.files / f"{run.name}_train.jsonl"
    if run.size:
        drawn = reward_models_data.draw(read_jsonl(source), run.size, run.seed)
        source = run.folder(place) / "train.jsonl"
        source.parent.mkdir(parents=True, exist_ok=True)
        write_lines(source, iter(drawn))
    stages = dict(
        reward=dict(program="train_reward", config=training(place, run, recipe, source)),
        report=dict(program="evaluate_reward", config=report(place, run, recipe)),
    )
    return ConfigDict(dict(seed=run.seed, order=tuple(stages), stages=stages))


@contextlib.contextmanager
def warnings_kept(path: pathlib.Path) -> Iterator[None]:
    """What our programs warn of stands in a file too: records that were left out, and why."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("rlhf_jax")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def run_all(place: Place, seeds: Sequence[int]) -> None:
    """The files, then every run that has no summary.json yet."""
    if not (place.files / "facts.json").is_file():
        reward_models_data.prepare(place.data, place.files, place.small)
    for run in runs_of(seeds, place.small):
        folder = run.folder(place)
        if (folder / "summary.json").is_file():
            _log.info("run %s: done before", folder.name)
            continue
        _log.info("run %s", folder.name)
        with warnings_kept(folder / "warnings.txt"):
            pipeline(config_of(place, run), str(folder))
    command(place, seeds[0])


def command(place: Place, seed: int) -> None:
    """`rlhf_jax.evaluate` as a user starts it, with the process model that learnt from PRMBench.

    Raises:
        subprocess.CalledProcessError: it failed; what it said stands above.
    """
    folder = place.workdir / "command"
    if (folder / "command.txt").is_file():
        return
    values = dict(
        model=Run("prmbench", 0, seed).folder(place) / "reward",
        rm_bench=place.data / "rm_bench/pairs.jsonl.gz",
        processbench=place.data / "processbench/gsm8k.jsonl.gz",
        max_length=1024,
    ) | (dict(limit=6) if place.small else {})
    argument = ",".join(f"{key}={value}" for key, value in values.items())
    words = ["-m", "rlhf_jax.evaluate", f"--workdir={folder}"]
    words.append(f"--config=configs/eval_reward.py:{argument}")
    subprocess.run([sys.executable, *words], check=True)
    (folder / "command.txt").write_text(" ".join(["python", *words]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/reward_models")
    parser.add_argument("--data", type=pathlib.Path, default=DATA, help=f"default: {DATA}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--page", type=pathlib.Path, default="docs/results/reward_models.md")
    parser.add_argument("--page-only", action="store_true", help="write the page of what is done")
    parser.add_argument("--small", action="store_true", help="every part short, for tests")
    args = parser.parse_args()
    set_up()
    # Runs of one set have the same shapes: they are compiled once.
    jax.config.update("jax_compilation_cache_dir", str(args.workdir.resolve() / "compiled"))
    place = Place(args.data, args.workdir, args.small)
    if not args.page_only:
        run_all(place, args.seeds)
    every = runs_of(args.seeds, place.small)
    folders = {
        name: [
            [run.folder(place) for run in every if (run.name, run.size) == (name, size)]
            for size in sizes_of(name, place.small)
        ]
        for name in RECIPES
    }
    words = [word for word in sys.argv[1:] if word != "--page-only"]
    said = f"python -m benchmarks.reward_models {' '.join(words)}".rstrip()
    reward_models_page.write(args.page, folders, place.workdir, place.data, said)
    print(json.dumps({"page": str(args.page)}))


if __name__ == "__main__":
    main()
