"""The quickstart with several seeds and its controls, and the page of what came out.

    python -m benchmarks.quickstart_study --workdir=runs/quickstart_study

For each seed: the main job (`configs/quickstart.py`), fine-tuning with a fifth more steps (was it
trained to its end?), and reward models trained on shuffled labels (is it the labels that teach?).
For the first seed also PPO with a tenth of the KL weight (over-optimisation). Every run is a
process of its own, so that its time and memory are its own. A run that is done is not run again
and one that was stopped goes on, so the command can be repeated; it ends by writing the page and
its figures from the runs' summaries. About an hour on two cores. ``--small`` shortens every run.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from benchmarks import quickstart_page
from configs.quickstart import get_config
from rlhf_jax.pipeline import pipeline
from rlhf_jax.program import set_up


class Run(NamedTuple):
    """One pipeline: the kind of run and its seed."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.kind}_{self.seed}"


def longer(config: ConfigDict, main: pathlib.Path) -> None:
    """Fine-tuning alone, a fifth longer."""
    del main
    stages = config.stages
    stages.sft.config.train.steps = round(1.2 * stages.sft.config.train.steps)
    stages.evaluation.config.reward = dict(init_from="", sources=dict())
    stages.evaluation.config.reference = ""
    del stages.evaluation.config.policies.policy
    config.order = ("sft", "evaluation")


def shuffled(config: ConfigDict, main: pathlib.Path) -> None:
    """From the main job's fine-tuned model on, the labels of training samples dealt out anew."""
    stages = config.stages
    stages.labels.config.label.shuffle = True
    for stage in (stages.labels, stages.reward, stages.policy):
        stage.config.model.init_from = str(main / "sft")
    stages.evaluation.config.policies.sft.init_from = str(main / "sft")
    config.order = ("labels", "reward", "policy", "evaluation")


def low_kl(config: ConfigDict, main: pathlib.Path) -> None:
    """From the main job's reward model on, a tenth of the KL weight and more steps to see it."""
    stages = config.stages
    stages.policy.config.train.steps = round(2.5 * stages.policy.config.train.steps)
    stages.policy.config.model.init_from = str(main / "sft")
    for section in (*stages.policy.config.rewards.values(), stages.evaluation.config.reward):
        if "init_from" in section:
            section.init_from = str(main / "reward")
    for source in stages.evaluation.config.reward.sources.values():
        source.name = source.name.replace("{workdir}", str(main))
    stages.policy.config.algorithm.kl_coef *= 0.1
    stages.evaluation.config.policies.sft.init_from = str(main / "sft")
    config.order = ("policy", "evaluation")


KINDS = {"main": None, "longer": longer, "shuffled": shuffled, "low_kl": low_kl}


def config_of(run: Run, workdir: pathlib.Path, small: bool) -> ConfigDict:
    """The quickstart's config, changed as the kind of run wants it."""
    config = get_config("small" if small else None)
    config.seed = run.seed
    # Only now: values that refer to the seed would not follow a change of the tree.
    config = config.copy_and_resolve_references()
    change = KINDS[run.kind]
    if change is not None:
        change(config, workdir / Run("main", run.seed).name)
    return config


def runs_of(seeds: Sequence[int]) -> list[Run]:
    """What there is to run, in order; one low_kl, which is for looking at."""
    every = {kind: [Run(kind, seed) for seed in seeds] for kind in KINDS}
    return [*every["main"], *every["low_kl"][:1], *every["shuffled"], *every["longer"]]


def run_all(runs: Sequence[Run], workdir: pathlib.Path, small: bool) -> None:
    """Every run that has no summary.json yet, one after the other.

    Raises:
        subprocess.CalledProcessError: a run failed; what it said stands above.
    """
    for run in runs:
        if not (workdir / run.name / "summary.json").is_file():
            print(f"run {run.name}", flush=True)
            one = [f"--one={run.kind}", f"--seeds={run.seed}", *(["--small"] if small else [])]
            command = [sys.executable, "-m", "benchmarks.quickstart_study", f"--workdir={workdir}"]
            subprocess.run([*command, *one], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/quickstart_study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--page", type=pathlib.Path, default="docs/results/quickstart.md")
    parser.add_argument("--one", choices=KINDS, help="only this run of the first seed, no page")
    parser.add_argument("--page-only", action="store_true", help="write the page of what is done")
    parser.add_argument("--small", action="store_true", help="every run short, for tests")
    args = parser.parse_args()
    if args.one:
        set_up()
        run = Run(args.one, args.seeds[0])
        pipeline(config_of(run, args.workdir, args.small), str(args.workdir / run.name))
        return
    if not args.page_only:
        run_all(runs_of(args.seeds), args.workdir, args.small)
    for name, picture in quickstart_page.FIGURES.items():
        folder = args.workdir / Run(name, args.seeds[0]).name
        shutil.copyfile(folder / "report.png", args.page.parent / picture)
    words = [word for word in sys.argv[1:] if word != "--page-only"]
    command = f"python -m benchmarks.quickstart_study {' '.join(words)}".rstrip()
    args.page.write_text(quickstart_page.page(args.workdir, args.seeds, command), encoding="utf-8")
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
