"""What scores on reward sets say, as numbers with 95 % intervals beside trivial baselines.

Pure functions on the host, one for each kind of set. A number that cannot be had (an AUC of one
class, say) is NaN and is written as null.
"""

import itertools
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data.plain_forms import Pair, Samples, Solution
from rlhf_jax.ops import rankings
from rlhf_jax.ops.calibration import calibration, pair_claims
from rlhf_jax.ops.length_bias import pair_lengths, within_prompt_correlations
from rlhf_jax.ops.process_metrics import (
    NO_ERROR,
    blind_f1,
    first_error,
    first_error_interval,
    first_wrong,
    step_accuracy,
)
from rlhf_jax.ops.reward_metrics import (
    auc,
    balanced_accuracy,
    best_of_k_curves,
    best_tie_threshold,
    bootstrap_interval,
    clustered_interval,
    cohen_kappa,
    pair_shares,
    prompt_aucs,
    prompt_interval,
    tie_accuracy,
)

LEAST = 10  # items that a category needs to count for the mean and the worst


class Estimate(NamedTuple):
    """A number, and its 95 % interval where it has one."""

    value: float | int
    low: float | None = None
    high: float | None = None


class Category(NamedTuple):
    """What one category of a set has, and of how many items."""

    value: Estimate
    count: int


class Findings(NamedTuple):
    """All that is said of a set; categories by kind and name, curves by name over `sizes`."""

    numbers: dict[str, Estimate]
    categories: dict[str, dict[str, Category]]
    sizes: Sequence[int] = ()
    curves: Mapping[str, Sequence[float]] = types.MappingProxyType({})


def pair_findings(
    items: Sequence[Pair],
    scores: Float[np.ndarray, "M 2"],
    lengths: Int[np.ndarray, "M 2"],
    groups: Int[np.ndarray, " M"],
    *,
    resamples: int,
    seed: int,
) -> Findings:
    """Pairs: accuracy with ties, calibration, length; ties of people and models where named.

    Accuracy and all beside it are of pairs that people did not call a tie. A tie of scores is half
    right; ``accuracy_strict`` counts it as wrong.

    Args:
        scores, lengths: of the better and the worse side; lengths in tokens.
        groups: pairs of one prompt have one number and depend on each other.
    """
    tie = np.array([item.tie for item in items])
    better, worse = scores[~tie].T
    strict, tied, _ = pair_shares(better, worse)
    said = 0.5 + 0.5 * np.sign(better - worse)
    size = pair_lengths(better, worse, *lengths[~tie].T)
    numbers = {
        "accuracy": Estimate(float(said.mean()), *clustered_interval(said, groups[~tie])),
        "accuracy_strict": Estimate(strict),
        "score_ties": Estimate(tied),
        "longer_wins": Estimate(size.longer_wins),
        "shorter_wins": Estimate(1 - size.longer_wins),
        "length_baseline": Estimate(max(size.longer_wins, 1 - size.longer_wins)),
        "accuracy_where_longer": Estimate(size.accuracy_longer),
        "accuracy_where_shorter": Estimate(size.accuracy_shorter),
        "equal_lengths": Estimate(size.equal),
        "length_correlation": Estimate(size.correlation),
        "mean_length_chosen": Estimate(size.mean_chosen),
        "mean_length_rejected": Estimate(size.mean_rejected),
        "auc": Estimate(auc(np.append(better, worse), np.repeat((1, 0), len(better)))),
    }
    numbers |= _calibrated(*pair_claims(better, worse), groups[~tie], least=0.5)
    if tie.any():
        numbers |= _tied(scores, tie)
    numbers |= _agreed([item.votes for item in items])
    numbers |= _ranked(items, scores, resamples=resamples, seed=seed)

    def of(kept: list[int]) -> Estimate:
        return Estimate(float(said[kept].mean()), *clustered_interval(said[kept], strangers[kept]))

    strangers = groups[~tie]
    decided = [item for item in items if not item.tie]
    return _with_categories(numbers, decided, of)


def sample_findings(
    items: Sequence[Samples],
    scores: Sequence[Float[np.ndarray, " _"]],
    lengths: Sequence[Int[np.ndarray, " _"]],
    groups: Int[np.ndarray, " N"],
    *,
    resamples: int,
    seed: int,
) -> Findings:
    """Prompts with samples: best of K beside the mean, the oracle and "the longest"; AUC, Brier.

    The curve is the unbiased one, up to the number of samples that most prompts have; prompts with
    fewer are not in it. ``best_of_loss`` is the mean over K of the oracle's curve less the model's.
    """
    correct = [np.asarray(item.correct, np.float64) for item in items]
    most = _commonest([len(z) for z in correct])
    sizes, enough = list(range(1, most + 1)), np.array([len(z) >= most for z in correct])
    by = {"model": scores, "oracle": correct, "longest": lengths}
    curves = {name: _curves(_floats(s), correct, sizes, enough) for name, s in by.items()}
    means = {name: np.nanmean(curve, axis=0) for name, curve in curves.items()}
    drawn = means["model"]
    aucs, every, bits = (
        prompt_aucs(scores, correct),
        np.concatenate(scores),
        np.concatenate(correct),
    )
    share = float(bits.mean())
    numbers = {
        "best_of_k": _mean(curves["model"][:, -1], groups),
        "k": Estimate(most),
        "prompts_below_k": Estimate(int((~enough).sum())),
        "best_of_peak": Estimate(float(drawn.max())),
        "best_of_peak_k": Estimate(sizes[int(drawn.argmax())]),
        "best_of_loss": Estimate(float((means["oracle"] - means["model"]).mean())),
        "mean_correct": _mean(curves["model"][:, 0], groups),
        "oracle_of_k": Estimate(float(means["oracle"][-1])),
        "longest_of_k": Estimate(float(means["longest"][-1])),
        "prompt_auc": _mean(aucs, groups),
        "prompts_with_both": Estimate(int(np.isfinite(aucs).sum())),
        "prompt_auc_longer": _mean(prompt_aucs(_floats(lengths), correct), groups),
        "auc": _bootstrapped(auc, scores, correct, resamples, seed),
        "balanced_accuracy": _bootstrapped(balanced_accuracy, scores, correct, resamples, seed),
        "majority_rate": Estimate(max(share, 1 - share)),
        "length_correlation": _mean(
            within_prompt_correlations(lengths, scores), groups, share=False
        ),
        "mean_length": Estimate(float(np.concatenate(lengths).mean())),
    }
    numbers |= _calibrated(every, bits, np.repeat(groups, [len(z) for z in correct]))

    def of(kept: list[int]) -> Estimate:
        return _mean(curves["model"][kept, -1], groups[kept])

    found = _with_categories(numbers, items, of)
    return found._replace(sizes=sizes, curves={name: mean.tolist() for name, mean in means.items()})


def _commonest(counts: Sequence[int]) -> int:
    """The number that occurs most often, the larger of two that do."""
    values, often = np.unique(counts, return_counts=True)
    return int(values[often == often.max()].max())


def _curves(scores, correct, sizes, enough) -> Float[np.ndarray, "N J"]:
    """Best of K by prompt; NaN for prompts that have too few samples."""
    kept = np.flatnonzero(enough)
    made = np.full((len(correct), len(sizes)), np.nan)
    made[kept] = best_of_k_curves([scores[i] for i in kept], [correct[i] for i in kept], sizes)
    return made


def solution_findings(
    items: Sequence[Solution],
    step_scores: Sequence[Float[np.ndarray, " _"]] | None,
    scores: Float[np.ndarray, " N"] | None,
    lengths: Int[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    *,
    threshold: float,
    resamples: int,
    seed: int,
) -> Findings:
    """Solutions: F1 of the first wrong step, steps for themselves, and whole solutions.

    Args:
        step_scores: logits of steps; None for a model without process head.
        scores: of whole solutions; None for a model without outcome head.
        threshold: logits not above it call a step wrong.
    """
    wanted = np.array([item.first_wrong for item in items])
    flawless = wanted == NO_ERROR
    numbers = {"flawless": Estimate(float(flawless.mean()))}
    numbers["length_auc"] = Estimate(auc(-lengths.astype(np.float64), flawless))
    if scores is not None:
        apart = [np.array([x]) for x in scores], [np.array([x]) for x in flawless]
        numbers["outcome_auc"] = _bootstrapped(auc, *apart, resamples, seed)
    if step_scores is None:
        return Findings(numbers, {})
    found = np.array([first_wrong(s, threshold=threshold) for s in step_scores])
    hits = (found == wanted).astype(np.float64)
    told = first_error(found, wanted)
    numbers |= {
        "f1": Estimate(told.f1, *first_error_interval(found, wanted, seed=seed)),
        "error_accuracy": _share(hits[~flawless], groups[~flawless]),
        "correct_accuracy": _share(hits[flawless], groups[flawless]),
        "exact": _share(hits, groups),
        "blind_f1": Estimate(blind_f1(wanted)),
    }
    numbers |= _steps(items, step_scores, threshold, groups, resamples, seed)

    def of(kept: list[int]) -> Estimate:
        part = found[kept], wanted[kept]
        if len(set(flawless[kept].tolist())) == 1:
            return _share(hits[kept], groups[kept])
        return Estimate(first_error(*part).f1, *first_error_interval(*part, seed=seed))

    return _with_categories(numbers, items, of)


def _steps(items, step_scores, threshold, groups, resamples, seed) -> dict[str, Estimate]:
    """Steps that have a label, each for itself."""
    labels = [np.array([math.nan if z is None else z for z in i.labels], float) for i in items]
    known = [~np.isnan(z) for z in labels]
    of_text = np.repeat(groups, [int(k.sum()) for k in known])
    scores = [s[k] for s, k in zip(step_scores, known, strict=True) if k.any()]
    labels = [z[k] for z, k in zip(labels, known, strict=True) if k.any()]
    sizes = [
        np.array([float(len(step)) for step in item.steps])[k]
        for item, k in zip(items, known, strict=True)
        if k.any()
    ]
    every, bits = np.concatenate(scores), np.concatenate(labels)
    claimed, share = every > threshold, float(bits.mean())
    told = step_accuracy(claimed, bits)
    right = (claimed == (bits > 0.5)).astype(np.float64)

    def balanced(s, z):
        return balanced_accuracy(s, z, threshold=threshold)

    return {
        "step_accuracy": _share(right, of_text),
        "step_majority_rate": Estimate(max(share, 1 - share)),
        "step_balanced_accuracy": _bootstrapped(balanced, scores, labels, resamples, seed),
        "step_auc": _bootstrapped(auc, scores, labels, resamples, seed),
        "step_auc_longer": Estimate(auc(np.concatenate(sizes), bits)),
        "step_f1": Estimate(told.f1),
        "step_negative_f1": Estimate(told.negative_f1),
        "prm_score": Estimate(told.prm_score),
        "steps": Estimate(len(bits)),
        **{f"step_{name}": v for name, v in _calibrated(every, bits, of_text).items()},
    }


def _tied(scores, tie) -> dict[str, Estimate]:
    """First, second or tie: what is told right with the threshold 0 and with the best one."""
    margins, outcomes = scores[:, 0] - scores[:, 1], np.where(tie, 0, 1)
    threshold, most = best_tie_threshold(margins, outcomes)
    share = float(tie.mean())
    # Which side comes first is arbitrary: a constant answer is right for ties, or half the others.
    return {
        "tie_accuracy": Estimate(tie_accuracy(margins, outcomes, threshold=0.0)),
        "tie_accuracy_best": Estimate(most),
        "tie_threshold": Estimate(threshold),
        "tie_majority_rate": Estimate(max(share, (1 - share) / 2)),
    }


def _agreed(votes) -> dict[str, Estimate]:
    """How far annotators agree, ties included, as the mean over every two of them: what a reward
    model could reach. Nothing where not all pairs have as many votes, two or more."""
    if None in votes or len({len(cast) for cast in votes}) > 1 or len(votes[0]) < 2:
        return {}
    found = [cohen_kappa(*two) for two in itertools.combinations(np.array(votes).T, 2)]
    return {"annotator_kappa": Estimate(sum(found) / len(found))}


def _ranked(items, scores, *, resamples, seed) -> dict[str, Estimate]:
    """How the models that wrote the answers are ranked, where three or more are named."""
    named = [i for i, item in enumerate(items) if len(set(item.models or ())) == 2]
    names = sorted({name for i in named for name in items[i].models})
    if len(names) < 3:
        return {}
    place = {name: number for number, name in enumerate(names)}
    first, second = (
        np.array([place[items[i].models[side]] for i in named]) for side in (0, 1)
    )  # fmt: skip
    if not rankings.connected(first, second, models=len(names)):
        return {}
    ours = 0.5 + 0.5 * np.sign(scores[named, 0] - scores[named, 1])
    theirs = np.array([0.5 if items[i].tie else 1.0 for i in named])
    found = rankings.agreement(
        first, second, ours, theirs, models=len(names), resamples=resamples, seed=seed
    )
    numbers = {f"ranking_{name}": Estimate(value) for name, value in found._asdict().items()}
    return numbers | {"ranking_models": Estimate(len(names))}


def _calibrated(logits, labels, groups, *, least: float = 0.0) -> dict[str, Estimate]:
    """Brier score and calibration error before and after temperature scaling.

    Prompts are dealt to the folds in turn, so all claims of one prompt are in one fold.
    """
    fold = np.unique(groups, return_inverse=True)[1] % 2
    found = calibration(logits, labels, fold, least=least)
    return {name: Estimate(value) for name, value in found._asdict().items()}


def _with_categories(numbers, items, of) -> Findings:
    """Adds the categories, and of each kind their mean and the worst."""
    members: dict[str, dict[str, list[int]]] = {}
    for place, item in enumerate(items):
        for kind, name in item.categories.items():
            members.setdefault(kind, {}).setdefault(name, []).append(place)
    categories = {
        kind: {name: Category(of(kept), len(kept)) for name, kept in sorted(named.items())}
        for kind, named in sorted(members.items())
    }
    for kind, named in categories.items():
        counted = [
            c.value.value
            for c in named.values()
            if c.count >= LEAST and not math.isnan(c.value.value)
        ]
        if len(counted) > 1:
            numbers[f"{kind}_mean"] = Estimate(sum(counted) / len(counted))
            numbers[f"{kind}_worst"] = Estimate(min(counted))
    return Findings(numbers, categories)


def _share(values, groups) -> Estimate:
    """A share with its interval; NaN of nothing."""
    if not len(values):
        return Estimate(math.nan)
    return Estimate(float(values.mean()), *clustered_interval(values, groups))


def _mean(values, groups, *, share: bool = True) -> Estimate:
    """The mean of what is finite, over prompts; entries of one prompt depend on each other."""
    finite = np.isfinite(values)
    kept = values[finite]
    if len(np.unique(groups[finite])) < 2:
        return Estimate(float(kept.mean()) if len(kept) else math.nan)
    return Estimate(*prompt_interval(kept, share=share, groups=groups[finite]))


def _bootstrapped(statistic, scores, labels, resamples, seed) -> Estimate:
    """A statistic of scores and labels by text; no interval where a draw may lack a class."""
    value = statistic(np.concatenate(scores), np.concatenate(labels))
    if math.isnan(value) or len(scores) < 2:
        return Estimate(value)
    low, high = bootstrap_interval(statistic, scores, labels, resamples=resamples, seed=seed)
    return Estimate(value, *((low, high) if math.isfinite(low + high) else ()))


def _floats(arrays: Iterable[Any]) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


def flat(findings: Mapping[str, Findings]) -> dict[str, float | int]:
    """``<set>/<number>`` with ``_low`` and ``_high``, of what is a number."""
    found = {}
    for label, one in findings.items():
        for name, estimate in one.numbers.items():
            if math.isnan(estimate.value):
                continue
            found[f"{label}/{name}"] = estimate.value
            for end in ("low", "high"):
                bound = getattr(estimate, end)
                if bound is not None and math.isfinite(bound):
                    found[f"{label}/{name}_{end}"] = bound
    return found
