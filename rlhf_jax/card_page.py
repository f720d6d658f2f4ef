"""The card of a reward model as a page of Markdown, from what stands in card.json.

The block of YAML at the top is what the Hugging Face hub reads.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

# What of a report is shown; all of it is in card.json.
_SHOWN = (
    "accuracy", "pair_accuracy", "longer_wins", "length_baseline", "correctness_auc", "auc",
    "best_of_k", "mean_correct", "prompt_auc", "f1", "blind_f1", "step_auc", "balanced_accuracy",
    "majority_rate", "step_accuracy", "step_majority_rate", "ece", "brier",
)  # fmt: skip
_PROBES = {
    "length": "a text with empty closing sentences behind it",
    "length_in_pairs": "pairs as they are, beside a constant for quality",
    "format": "every sentence as an item of a list, less the plain text",
    "sycophancy": "opening with agreement, less a neutral opening",
    "refusal": "an empty refusal, less the answer",
    "consistency": "pairs whose order stays under a neutral opening on both sides",
    "prompt_offset": "variance of scores between prompts, of all variance",
}
_TASKS = {"outcome": "text-classification", "process": "token-classification"}
_JOINT = ("advantage", "odin")  # heads that train together
_ADVANTAGE = (
    "An advantage model: the run's own numbers are of r, the outcome head alone (accuracy of right "
    "and wrong answers is r > 0; the order of a pair is that of r − e as well). Probes, reports, "
    "`score` and the reward of a policy are of r − e, the outcome head less what is expected of "
    "the prompt."
)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


def page(facts: Mapping[str, Any], exported: Mapping[str, Any] | None = None) -> str:
    """The whole page.

    Args:
        facts: the content of card.json.
        exported: what a Hugging Face folder holds of it (what, dtype, and member of an ensemble).
    """
    lines = ["---", _metadata(facts, exported), "---", "", "# Card of a reward model", ""]
    lines += _model(facts["model"], exported) + _data(facts["data"]) + _training(facts["training"])
    lines += _evaluation(facts) + _probes(facts["probes"])
    lines += ["", "## Known limits", "", *(f"- {one}" for one in facts["limits"])]
    lines += _said_limits(facts)
    lines += ["", "## Licence", "", f"{facts['licence']} (the model; for the data see above)"]
    return "\n".join(lines) + "\n"


def _metadata(facts: Mapping[str, Any], exported: Mapping[str, Any] | None) -> str:
    """What the hub reads: licence, base, task."""
    licence, base = facts["licence"].strip(), facts["model"]["base"]
    known = bool(_IDENTIFIER.fullmatch(licence))
    data = ModelCardData(
        license=licence.lower() if known else "other",
        license_name=None if known else licence,
        base_model=base if _HUB.fullmatch(base) and not facts["model"]["from_random"] else None,
        library_name="transformers" if exported else "rlhf_jax",
        pipeline_tag=_TASKS.get(exported["what"]) if exported else None,
        tags=["reward-model", "rlhf"],
    )
    return data.to_yaml().strip()


def _model(model: Mapping[str, Any], exported: Mapping[str, Any] | None) -> list[str]:
    shape = model["config"]
    rows = [
        ["base", model["base"]],
        ["tokenizer", model["tokenizer"]],
        [
            "architecture",
            f"decoder of {shape['layers']} layers, width {shape['width']}, {shape['heads']} heads "
            f"({shape['kv_heads']} of keys), MLP {shape['mlp_width']}, vocabulary "
            f"{shape['vocab_size']}",
        ],
        ["parameters", f"{model['parameters']:,}, {model['trained_parameters']:,} of them trained"],
        ["heads", ", ".join(model["heads"])],
    ]
    if shape["lora_rank"]:
        rows.append(["adapters", f"rank {shape['lora_rank']}, alpha {shape['lora_alpha']}"])
    if model["members"] > 1:
        rows.append(["members", f"{model['members']} ({model['ensemble']})"])
    if exported:
        rows += [[name, str(value)] for name, value in exported.items()]
    return ["## Model", "", *_table(["what", "is"], rows)]


def _data(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["", "## Data and provenance"]
    for one in sources:
        print_of = one.get("sha256") or one.get("options_sha256")
        rows = [
            ["kind", one["kind"]],
            ["source", f"`{one['name']}`, split `{one['split']}`"],
            ["records", f"{one['records']} of {one['records_of_source']}"],
            ["options", _values(one["options"])],
            ["SHA-256 of the " + ("file" if "sha256" in one else "options"), print_of or "–"],
            ["read as", _values(one["read"])],
            *([name, one[name]] for name in ("origin", "annotators", "aggregation", "licence")),
        ]
        rows = [row for row in rows if row[1]]
        lines += ["", f"### {one['label']} ({one['use']})", "", *_table(["what", "is"], rows)]
    return lines


def _training(training: Mapping[str, Any]) -> list[str]:
    losses = [
        [one["source"], one["loss"], one["head"] or "–", str(one["weight"]), str(one["rows"])]
        for one in training["losses"]
    ]
    joint = [f"{n}: {_values(training[n]) or 'as usual'}; " for n in _JOINT if n in training]
    return [
        "", "## Training", "",
        *_table(["source", "loss", "head of its own", "weight", "rows per step"], losses),
        "",
        f"{training['steps']} steps, seed {training['seed']}; {''.join(joint)}centring "
        f"{training['centre_coef']}, label smoothing {training['smoothing']}; optimizer: "
        f"{_values(training['optimizer'])}.",
    ]  # fmt: skip


def _evaluation(facts: Mapping[str, Any]) -> list[str]:
    found, reports = facts["evaluation"]["held_out"], facts["evaluation"]["reports"]
    lines = ["", "## Evaluation"]
    if found:
        rows = [[name, _number(value)] for name, value in sorted(found.items())]
        lines += ["", "The run's own held-out data, at its last step:", ""]
        lines += [_ADVANTAGE, ""] if "advantage" in facts["training"] else []
        lines += _table(["number", "value"], rows)
    for name, numbers in sorted(reports.items()):
        kept = [n for n in numbers if n.rpartition("/")[2] in _SHOWN]
        rows = [[n, _interval(numbers, n)] for n in sorted(kept)]
        lines += ["", f"`{name}`, with 95 % intervals:", ""]
        lines += _table(["number", "value"], rows)
    if not found and not reports:
        lines += ["", "None: nothing was held out, and no evaluation was added yet."]
    return lines


def _probes(probes: Mapping[str, Any]) -> list[str]:
    lines = [
        "", "## Probes", "",
        f"On {probes['records']} records of `{probes['source']}` ({probes['use']}), by the head "
        f"`{probes['head']}` at the last token. Intervals are 95 %, over prompts; rewards are the "
        "numbers before any sigmoid.",
        "",
    ]  # fmt: skip
    rows = []
    for one in probes["findings"]:
        said = f"not applicable: {one['reason']}"
        if not one["reason"]:
            said = f"{_number(one['value'])} ({_number(one['low'])} to {_number(one['high'])})"
            said += f" {one['unit']}"
        more = f"higher in {_number(one['share_higher'])}" if "share_higher" in one else ""
        what = _PROBES.get(one["name"], "changed less original, pairs of one's own")
        rows.append([one["name"], what, said, more, str(one.get("prompts", ""))])
    return lines + _table(["probe", "what", "found", "beside", "prompts"], rows)


def _said_limits(facts: Mapping[str, Any]) -> list[str]:
    """Limits that the facts themselves show."""
    lines = []
    if not facts["evaluation"]["held_out"] and not facts["evaluation"]["reports"]:
        lines.append("- Not evaluated: nothing here says what it does with texts it has not seen.")
    if facts["probes"]["use"] == "training":
        lines.append("- The probes are on texts that it was trained on.")
    unknown = [s["label"] for s in facts["data"] if "unknown" in s["licence"].lower()]
    if unknown:
        named = ", ".join(dict.fromkeys(unknown))
        lines.append(f"- The licence of its data is not known: {named}.")
    return lines


def _values(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in section.items() if value is not None)


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _interval(numbers: Mapping[str, Any], name: str) -> str:
    low, high = (numbers.get(f"{name}_{side}") for side in ("low", "high"))
    said = _number(numbers[name])
    return said if low is None or high is None else f"{said} ({_number(low)} to {_number(high)})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "/").replace("\n", "\\n") for cell in row] for row in rows]
    return [
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]
