"""Every algorithm on the embedded task with learned rewards, and the page of what came out.

    python -m benchmarks.algorithms --workdir=runs/algorithms

For each seed: the quickstart's fine-tuned model and its two learned rewards; from there every
method for as many iterations of as many samples, offline DPO on the pairs that the outcome reward
learnt from, and one evaluation of all of them on problems that nothing was trained on. Every run is
a process of its own. A run that is done is not run again and one that was stopped goes on, so the
command can be repeated; it ends by writing the page and its figure from what the runs have left.
``--small`` shortens every run.
"""

import argparse
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from benchmarks import algorithms_page
from configs import dpo
from configs.quickstart import get_config
from rlhf_jax.evaluate import evaluate
from rlhf_jax.pipeline import pipeline
from rlhf_jax.program import set_up
from rlhf_jax.train_dpo import train_dpo
from rlhf_jax.train_policy import train_policy

ITERATIONS = 20  # of 64 prompts x 4 samples
PROBLEMS = 1_000  # of the test split
START = "sft"
# The section of the algorithm; what it does not say is our default. β is what holds the policy near
# its start: learned rewards are only good there. In a loss it is k2's: the gradient of k3 is at
# most β and normalised advantages are of order 1, so k3 holds nothing that they pull.
NEAR = dict(kl_coef=0.3, kl_estimator="k2")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "ppo": dict(kl_coef=0.2),
    # Settings of PPO; 0.5 is a probability, as below.
    "vc_ppo": dict(name="ppo", kl_coef=0.2, lam=0.95, value_lam=1.0),
    "vapo": dict(
        name="ppo", kl_coef=0.2, lam_alpha=0.05, value_lam=1.0, clip=0.2, clip_high=0.28,
        imitate=dict(reward="outcome", above=0.5, weight=0.1),
    ),
    "grpo": NEAR,
    "dr_grpo": dict(kl_coef=0.1, kl_estimator="k2", constant=32),
    "dapo": NEAR,
    "gspo": NEAR,
    "cispo": NEAR,
    "rloo": dict(kl_coef=0.2),
    "reinforce_plus_plus": dict(kl_coef=0.2),
    "pe_reinforce": dict(kl_coef=1 / 6),
    "superhf": dict(),
    "best_of_n": dict(),
    "expert_iteration": dict(reward="outcome", threshold=0.5, most=2),  # a probability above 1/2
    "online_dpo": dict(),
    # Of the quickstart's process model; an implicit one would be another reward than the others'.
    "prime": dict(coef=1.0, **NEAR),
}  # fmt: skip
# The first iterations, in which the critic trains alone and the policy stands still.
PRETRAIN: Mapping[str, int] = {"vc_ppo": 4, "vapo": 4}
# Where PPO's learning rate goes too far: imitation collapses, and pairs pull without end.
RATES: Mapping[str, float] = {"best_of_n": 3e-5, "expert_iteration": 3e-5, "online_dpo": 1e-4}
OFFLINE = "dpo"


def base_config(seed: int, small: bool) -> ConfigDict:
    """The quickstart up to its reward models."""
    config = get_config("small" if small else None)
    config.seed = seed
    # Only now: values that refer to the seed would not follow a change of the tree.
    config = config.copy_and_resolve_references()
    config.order = ("sft", "labels", "reward")
    return config


def method_config(method: str, seed: int, base: pathlib.Path, small: bool) -> ConfigDict:
    """The quickstart's policy stage with another algorithm."""
    config = base_config(seed, small).stages.policy.config
    config.model.init_from = str(base / START)
    for section in config.rewards.values():
        if "init_from" in section:
            section.init_from = str(base / "reward")
    config.algorithm = ConfigDict(dict(name=method) | METHODS[method])
    if method in PRETRAIN:
        config.value.pretrain = dict(steps=1 if small else PRETRAIN[method])
    config.optimizer.policy.learning_rate = RATES.get(method, config.optimizer.policy.learning_rate)
    config.train.steps = 4 if small else ITERATIONS
    config.checkpoint.every = config.train.steps
    return config


def offline_config(seed: int, base: pathlib.Path, small: bool) -> ConfigDict:
    """Offline DPO as `configs/dpo.py` has it, on the labels of the base."""
    config = dpo.get_config("small" if small else None)
    config.seed = seed
    config = config.copy_and_resolve_references().stages.dpo.config
    config.model.init_from = str(base / START)
    for sources in (config.sources, config.eval.sources):
        for source in sources.values():
            source.name = source.name.replace("{workdir}", str(base))
    return config


def evaluation_config(
    methods: Sequence[str], seed: int, base: pathlib.Path, small: bool
) -> ConfigDict:
    """All policies of a seed beside their start."""
    config = base_config(seed, small).stages.evaluation.config
    folders = {START: base / START} | {name: base.parent / f"{name}_{seed}" for name in methods}
    config.policies = ConfigDict({n: dict(init_from=str(path)) for n, path in folders.items()})
    config.reference = START
    config.problems = 64 if small else PROBLEMS
    config.reward = ConfigDict(dict(init_from="", sources=dict()))
    return config


def run_one(what: str, seed: int, methods: Sequence[str], workdir: pathlib.Path, small: bool):
    """One process's work: the base of a seed, a method, or the evaluation of all methods."""
    base = workdir / f"base_{seed}"
    folder = str(workdir / f"{what}_{seed}")
    if what == "base":
        pipeline(base_config(seed, small), folder)
    elif what == "evaluation":
        evaluate(evaluation_config(methods, seed, base, small), folder)
    elif what == OFFLINE:
        train_dpo(offline_config(seed, base, small), folder)
    else:
        train_policy(method_config(what, seed, base, small), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/algorithms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    known = [*METHODS, OFFLINE]
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--page", type=pathlib.Path, default="docs/results/algorithms.md")
    parser.add_argument("--one", help="only this run of the first seed, no page")
    parser.add_argument("--page-only", action="store_true", help="write the page of what is done")
    parser.add_argument("--small", action="store_true", help="every run short, for tests")
    args = parser.parse_args()
    if args.one:
        set_up()
        run_one(args.one, args.seeds[0], args.methods, args.workdir, args.small)
        return
    for seed in () if args.page_only else args.seeds:
        for what in ("base", *args.methods, "evaluation"):
            if (args.workdir / f"{what}_{seed}" / "summary.json").is_file():
                continue
            print(f"run {what}_{seed}", flush=True)
            rest = ["--small"] if args.small else []
            rest += ["--methods", *args.methods, f"--one={what}", f"--seeds={seed}"]
            command = [sys.executable, "-m", "benchmarks.algorithms", f"--workdir={args.workdir}"]
            subprocess.run([*command, *rest], check=True)
    words = [word for word in sys.argv[1:] if word != "--page-only"]
    command = f"python -m benchmarks.algorithms {' '.join(words)}".rstrip()
    algorithms_page.write(args.page, args.workdir, args.seeds, args.methods, command)
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
