"""The report on a reward model as a page of Markdown, from what stands in report.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.reward_numbers import LEAST

Numbers = Mapping[str, Mapping[str, float | int | None]]

# Kind of set -> title, what it says, and columns: their heading and the number they show.
_TABLES: Mapping[str, tuple[str, str, Sequence[tuple[str, str]]]] = {
    "pairs": (
        "Pairs",
        "A tie of scores is half right; pairs that people call a tie are left out of the accuracy. "
        '"longer" is the accuracy of the rule "the longer one is better"; "if longer" and "if '
        'shorter" are the accuracy where the better one is longer, or shorter. Calibration is that '
        "of the claim that the higher score is better; ECE' is after temperature scaling, fitted "
        "on other prompts.",
        (
            ("accuracy", "accuracy"),
            ("longer", "longer_wins"),
            ("shorter", "shorter_wins"),
            ("if longer", "accuracy_where_longer"),
            ("if shorter", "accuracy_where_shorter"),
            ("ties", "score_ties"),
            ("AUC", "auc"),
            ("Brier", "brier"),
            ("ECE", "ece"),
            ("ECE'", "ece_scaled"),
        ),
    ),
    "samples": (
        "Samples",
        "Best of K is the share of prompts for which the highest-scored of K samples is right, in "
        "expectation over all draws of K. Beside it: a random sample, the longest, and any of the "
        "K. AUC is within prompts, averaged.",
        (
            ("K", "k"),
            ("best of K", "best_of_k"),
            ("random", "mean_correct"),
            ("longest", "longest_of_k"),
            ("any", "oracle_of_k"),
            ("AUC", "prompt_auc"),
            ("AUC of length", "prompt_auc_longer"),
            ("Brier", "brier"),
            ("ECE", "ece"),
            ("ECE'", "ece_scaled"),
        ),
    ),
    "solutions": (
        "Solutions in steps",
        "F1 is the harmonic mean of two accuracies: the first wrong step found exactly in "
        'solutions with an error, and "no error" said of those without. "blind F1" is the best '
        "guess that looks at no solution. Steps are those that have a label. Categories have their "
        "F1, or where all of their solutions are of one kind the share told exactly.",
        (
            ("F1", "f1"),
            ("with error", "error_accuracy"),
            ("without", "correct_accuracy"),
            ("blind F1", "blind_f1"),
            ("step accuracy", "step_accuracy"),
            ("majority", "step_majority_rate"),
            ("step AUC", "step_auc"),
            ("AUC of length", "step_auc_longer"),
            ("PRMScore", "prm_score"),
            ("outcome AUC", "outcome_auc"),
        ),
    ),
}


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    texts = ", ".join(f"{name} {value!r}" for name, value in report["texts"].items())
    heads = ", ".join(f"{name} by {head}" for name, head in report["heads"].items())
    by = report["threshold_from"]
    chosen = f", the best for the F1 of {by}, which is flattered by it" if by else ""
    lines = [
        "# A reward model on published sets",
        "",
        f"- model: `{report['model']}`, tokenizer `{report['tokenizer']}`",
        f"- read: {heads}; a step is right above P = {report['threshold']:.3f}{chosen}",
        f"- texts: {texts}",
        "",
        "Intervals are 95 %: of shares with the dependence of items that share a prompt, of means "
        "over prompts, of areas by a bootstrap over texts. A dash is a number that the set cannot "
        f"give. The mean and the worst of categories leave out those of fewer than {LEAST} items. "
        "All numbers are in `report.json`, all scores in `scores.jsonl`.",
    ]
    for kind, (title, said, columns) in _TABLES.items():
        sets = {k: one for k, one in report["sets"].items() if one["kind"] == kind}
        if sets:
            lines += ["", f"## {title}", "", said, "", *_overview(sets, columns)]
        for label, one in sets.items():
            lines += ["", *_section(label, one)]
    return "\n".join(lines) + "\n"


def _overview(sets: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    rows = [
        [label, str(one["counts"]["used"]), *(_shown(one["numbers"], name) for _, name in columns)]
        for label, one in sets.items()
    ]
    return _table(["set", "used", *(heading for heading, _ in columns)], rows)


def _section(label: str, one: Mapping[str, Any]) -> list[str]:
    """What is said of one set below the overview."""
    counts = ", ".join(
        f"{count} {name.replace('_', ' ')}" for name, count in one["counts"].items() if count
    )
    lines = [f"### {label}", "", f"`{one['form']}` from `{one['source']}`: {counts}."]
    shown = {name for _, name in _TABLES[one["kind"]][2]}
    rest = [name for name in one["numbers"] if name not in shown]
    said = [f"{name} {_shown(one['numbers'], name)}" for name in rest]
    lines += ["", "; ".join(said) + "."]
    for kind, named in one["categories"].items():
        if len(named) > 1:
            lines += ["", *_categories(kind, named)]
    if one["sizes"]:
        lines += ["", *_curve(one["sizes"], one["curves"])]
    return lines


def _categories(kind: str, named: Numbers) -> list[str]:
    """Categories, the worst first."""
    order = sorted(named, key=lambda n: (named[n]["value"] is None, named[n]["value"], n))
    rows = [[name, str(named[name]["count"]), _shown(named, name)] for name in order]
    return _table([f"{kind}, worst first", "used", "value"], rows)


def _curve(sizes: Sequence[int], curves: Mapping[str, Sequence[float]]) -> list[str]:
    """Best of K for K = 1, 2, 4, ... and the last."""
    kept = [i for i, k in enumerate(sizes) if k & (k - 1) == 0 or i == len(sizes) - 1]
    rows = [[name, *(f"{curve[i]:.3f}" for i in kept)] for name, curve in curves.items()]
    return _table(["best of K by", *(str(sizes[i]) for i in kept)], rows)


def _shown(numbers: Numbers, name: str) -> str:
    """A number with its interval, or a dash."""
    found = numbers.get(name, {})
    value, low, high = (found.get(part) for part in ("value", "low", "high"))
    if value is None:
        return "–"
    text = str(value) if isinstance(value, int) else f"{value:.3f}"
    return text if low is None or high is None else f"{text} ({low:.3f} to {high:.3f})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        f"|---{'|---:' * (len(headings) - 1)}|",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]
