"""What choosing among a policy's samples is worth: by reward models, by votes, by the truth.

    python -m rlhf_jax.evaluate --config=configs/X.py --workdir=DIR      (a config with ``best_of``)

M samples of each held-out problem from every policy of ``policies``. ``gold``, a reward that needs
no model, says what each is worth; each reward of ``rewards``, learned or not, says which it would
take. For k of the M samples, k in ``best_of.sizes``, with 95 % intervals over prompts:

    <policy>/best_of_<k>/<reward>    gold of the one that the reward scores highest (unbiased)
    <policy>/oracle_<k>              of the one that gold scores highest: pass@k if gold is 0 or 1
    <policy>/majority_<k>            of the answer that most samples give, answers being the numbers
                                     behind ``best_of.marker`` ("": no votes)
    <policy>/weighted_<k>/<reward>   the same with votes weighed by the reward's scores, for rewards
                                     that ``best_of.weights`` names: "score", or its "sigmoid"

and <policy>/gold, the mean of all samples. Every sample goes to evaluation.jsonl with its scores;
best_of_n.png draws the curves. Learned rewards score as in a policy run, by the same code.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from rlhf_jax import build, run_folder
from rlhf_jax.judge import Judge, check_judge, make_judge
from rlhf_jax.label_samples import write_lines
from rlhf_jax.learned_judge import check_learned, make_learned
from rlhf_jax.ops.reward_metrics import best_of_k_curves, prompt_interval
from rlhf_jax.ops.voting import majority_of_k
from rlhf_jax.policy_sampler import PolicySampler, check_problems, of_policy
from rlhf_jax.rewards.exact_match import parse_answer
from rlhf_jax.training.keys import Purpose

# How a reward's score becomes the weight of a vote.
WEIGHTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": lambda scores: 1 / (1 + np.exp(-np.clip(scores, -60, 60))),
    "score": lambda scores: scores,
}


class Drawn(NamedTuple):
    """What one policy drew: lines of evaluation.jsonl, and numbers by prompt and sample."""

    rows: list[dict[str, Any]]
    gold: Float[np.ndarray, "N M"]
    scores: Mapping[str, Float[np.ndarray, "N M"]]
    answers: list[list[Any]]


def drawn(
    stage: str, sampler: PolicySampler, gold: Judge, judges: Mapping[str, Judge], config: ConfigDict
) -> Drawn:
    """Samples, scores and reads the completions of one policy."""
    marker = config.best_of.get("marker", "####")
    rows, answers, batches = [], [], []
    for first, rollouts in sampler.batches(config.problems):
        kept, k = config.problems - first, rollouts.group_size
        said = {name: judge(rollouts) for name, judge in {"": gold, **judges}.items()}
        batches.append({name: x.reshape(-1, k)[:kept] for name, x in said.items()})
        for name, x in batches[-1].items():
            _check_finite(f"rewards.{name}" if name else "gold", stage, x, first)
        for i, group in enumerate(sampler.decode(rollouts)[:kept]):
            answers.append([parse_answer(s.completion, marker) if marker else None for s in group])
            for j, sample in enumerate(group):
                scores = {name: float(x[i, j]) for name, x in batches[-1].items() if name}
                rows.append(
                    {
                        "stage": stage,
                        "prompt": sample.prompt,
                        "completion": sample.completion,
                        "truncated": not sample.ended,
                        "gold": float(batches[-1][""][i, j]),
                        "scores": scores,
                    }
                )
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return Drawn(rows, whole.pop(""), whole, answers)


def _check_finite(path: str, stage: str, scores: Float[np.ndarray, "N M"], first: int) -> None:
    """Raises a ValueError for a score that is no number: nothing is better or worse than that."""
    if not np.isfinite(scores).all():
        row, sample = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(
            f"{path} scores sample {sample} of problem {first + row} by policies.{stage} with "
            f"{scores[row, sample]}; wanted a finite number"
        )


def curves(found: Drawn, config: ConfigDict) -> dict[str, Float[np.ndarray, "N J"]]:
    """The estimate of each prompt for each size, by the name of the way of choosing."""
    sizes, gold = tuple(config.best_of.sizes), found.gold
    draws = config.best_of.get("draws", 200)

    def voted(weights: Sequence[np.ndarray | None]) -> np.ndarray:
        rows = zip(found.answers, gold, weights, strict=True)
        return np.array(
            [
                majority_of_k(a, g, sizes, weights=w, draws=draws, seed=config.seed)
                for a, g, w in rows
            ]
        )

    made = {
        f"best_of/{label}": best_of_k_curves(list(scores), list(gold), sizes)
        for label, scores in found.scores.items()
    }
    made["oracle"] = best_of_k_curves(list(gold), list(gold), sizes)
    if config.best_of.get("marker", "####"):
        made["majority"] = voted([None] * len(gold))
        for label, how in config.best_of.get("weights", {}).items():
            weights = WEIGHTS[how](found.scores[label])
            if (weights < 0).any():
                raise ValueError(
                    f"best_of.weights.{label}={how!r}: a vote cannot weigh {weights.min():g}; "
                    'scores below 0 want "sigmoid"'
                )
            made[f"weighted/{label}"] = voted(list(weights))
    return made


def numbers_of(
    stage: str,
    found: Drawn,
    made: Mapping[str, Float[np.ndarray, "N J"]],
    sizes: Sequence[int],
    *,
    share: bool,
) -> dict[str, float]:
    """Means over prompts with 95 % intervals, by name; `share`: gold lies in [0, 1]."""
    numbers: dict[str, float] = {}

    def add(name: str, values: np.ndarray) -> None:
        mean, low, high = prompt_interval(values, share=share)
        numbers.update({name: mean, f"{name}_low": low, f"{name}_high": high})

    add(f"{stage}/gold", found.gold.mean(axis=1))
    for name, values in made.items():
        way, _, label = name.partition("/")
        for j, size in enumerate(sizes):
            add("/".join(filter(None, (stage, f"{way}_{size}", label))), values[:, j])
    return numbers


def draw(
    path, numbers: Mapping[str, float], stages: Sequence[str], config: ConfigDict, ways
) -> None:
    """best_of_n.png: gold of the chosen sample over k, a panel for each policy."""
    figure = Figure(figsize=(6 * len(stages), 4.5), layout="constrained")
    sizes = tuple(config.best_of.sizes)
    for axes, stage in zip(
        figure.subplots(1, len(stages), squeeze=False).flat, stages, strict=True
    ):
        for name in ways:
            way, _, label = name.partition("/")
            names = ["/".join(filter(None, (stage, f"{way}_{k}", label))) for k in sizes]
            middle = [numbers[n] for n in names]
            line = axes.plot(sizes, middle, marker="o", markersize=3, label=name)[0]
            low, high = ([numbers[f"{n}_{side}"] for n in names] for side in ("low", "high"))
            axes.fill_between(sizes, low, high, alpha=0.15, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xlabel("samples to choose from (k)")
        axes.set_title(f"{stage}: gold of what is chosen, 95 % intervals")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def check_config(config: ConfigDict) -> None:
    """Raises a ValueError for what cannot be evaluated; opens nothing."""
    sizes, samples = tuple(config.best_of.sizes), config.rollout.samples
    wrong = [k for k in sizes if not 1 <= k <= samples]
    if wrong or not sizes or list(sizes) != sorted(set(sizes)):
        raise ValueError(
            f"best_of.sizes={sizes}; wanted rising numbers from 1 to rollout.samples={samples}"
        )
    for label, how in config.best_of.get("weights", {}).items():
        if label not in config.rewards:
            known = ", ".join(config.rewards)
            raise ValueError(f"best_of.weights.{label}: no such reward; rewards has {known}")
        if how not in WEIGHTS:
            raise ValueError(f"best_of.weights.{label}={how!r}; known: {', '.join(WEIGHTS)}")
    if config.problems < 2:
        raise ValueError(f"problems={config.problems}; wanted 2 or more, for an interval")
    if not config.policies:
        raise ValueError("policies is empty; name at least one, as dict(sft=dict(init_from=DIR))")
    check_judge("gold", config.gold)
    for label, section in config.rewards.items():
        check_learned(label, section)


def evaluate_best_of(config: ConfigDict, workdir: str, conclude) -> dict[str, float | int]:
    """Evaluates choosing among the samples of what ``config.policies`` name; returns the numbers.

    Args:
        conclude: prints and writes the numbers (see `rlhf_jax.evaluate`).

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    started = time.time()
    check_config(config)
    build.check_sampling(config.rollout.sampling)
    samplers = {
        stage: PolicySampler(of_policy(config, stage), Purpose.EVALUATE, f"policies.{stage}")
        for stage in config.policies
    }
    plans = {label: make_learned(label, config) for label in config.rewards}
    for sampler in samplers.values():
        check_problems("problems", config.problems, sampler)
    folder = run_folder.prepare(workdir, config, {})
    found: dict[str, Drawn] = {}
    for stage, sampler in samplers.items():
        gold = make_judge("gold", config.gold, sampler)
        judges = {label: plan(sampler) for label, plan in plans.items()}
        found[stage] = drawn(stage, sampler, gold, judges, config)
        write_lines(
            folder / "evaluation.jsonl", [row for one in found.values() for row in one.rows]
        )
    numbers, ways = {}, ()
    share = all(one.gold.min() >= 0 and one.gold.max() <= 1 for one in found.values())
    for stage, one in found.items():
        made = curves(one, config)
        ways = tuple(made)
        numbers |= numbers_of(stage, one, made, config.best_of.sizes, share=share)
    if jax.process_index() == 0:
        draw(folder / "best_of_n.png", numbers, tuple(samplers), config, ways)
    compiles = sum(sampler.compiles.after_warmup for sampler in samplers.values())
    return conclude(folder, numbers, compiles, started)
