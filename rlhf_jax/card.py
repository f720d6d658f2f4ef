"""The card of a reward model: what it is, what it learnt from, who judged, and how it is biased.

    python -m rlhf_jax.card --workdir=RUN --reports=DIR,DIR

`train_reward` writes card.json and card.md into the run's folder, `rlhf_jax.export` takes them
along as the README.md of what it writes, and a pipeline adds what its evaluations found; so does
this program, for evaluations that were run for themselves (folders of `rlhf_jax.evaluate_reward`
or `rlhf_jax.evaluate`). What a card says is asked for by Lambert, Gilbert and Zick 2023, "The
History and Risks of Reinforcement Learning and Human Feedback", https://arxiv.org/abs/2310.13595.
The page has the form of the cards on the Hugging Face hub.

What no program can know stands in the config's section ``card``, and nothing of it may be left out:
who made the data, who judged, how judgements became labels, under which licence. "unknown" is an
answer; silence is an error.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import jax
from ml_collections import ConfigDict

from rlhf_jax import program, run_folder
from rlhf_jax.card_page import page
from rlhf_jax.fit import Fit
from rlhf_jax.models.lora import partition
from rlhf_jax.models.members import num_parameters
from rlhf_jax.probes import Finding
from rlhf_jax.schema import check_keys, within
from rlhf_jax.training.writer import plain, write_json, write_text

_log = logging.getLogger("rlhf_jax.card")  # __name__ is "__main__" when it is run
JSON, MARKDOWN = "card.json", "card.md"

# What must be said, and what would be right.
_PROVENANCE = {
    "origin": "who made the data and where they can be had, such as a paper, a link or a program",
    "annotators": "who judged: how many people, from where, or 'no people: ...'",
    "aggregation": "how judgements became labels: one vote, a majority, the mean as a soft label, "
    "a label per group",
    "licence": "the licence of the data, such as 'MIT'",
}
_MODEL = {
    "licence": "the licence of the model, such as 'Apache-2.0'",
    "limits": "a list of what the model is known not to do, such as ('English only',)",
}
_LOSSES = {
    "pairs": "Bradley-Terry with soft labels and margins, at the last token",
    "correctness": "binary cross-entropy at the last token",
    "steps": "binary cross-entropy at the ends of steps, the mean of each solution",
    "texts": "",
}
# What heads that train together have beside that.
_EXPECTED = "squared error of what is expected of the prompt"
_JOINT = {
    "advantage": {
        "pairs": f"; a bound on scores; {_EXPECTED}, unless sampled answers say it",
        "correctness": f"; {_EXPECTED}",
        "texts": _EXPECTED,
    },
    "odin": {
        "pairs": ", of the sum of quality and length; correlations of both with the number of "
        "tokens; overlap of their weights"
    },
}
# Keys of a source that say where it is and how it is run, not what was done to its data.
_PLAIN = ("kind", "name", "split", "data_dir", "options", "weight", "rows")


def check_card(config: ConfigDict) -> None:
    """Holds the section ``card`` to what a card must say; opens nothing.

    Raises:
        ValueError: naming the first field that is missing or empty, what stands there and what
            would be right.
    """
    if "card" not in config:
        raise ValueError(
            f"card is missing; the config has {', '.join(sorted(config))}; wanted "
            "card=dict(sources=dict(...), licence=..., limits=(...,)), with origin, annotators, "
            "aggregation and licence of every source: a reward model is saved with where it comes "
            "from ('unknown' is an answer)"
        )
    card = config.card.to_dict()
    told, labels = card.get("sources", {}), _labels(config)
    check_keys("card.sources", told, labels)
    for label in labels:
        _check_said(f"card.sources.{label}", told.get(label, {}), _PROVENANCE)
    _check_said("card", card, _MODEL)
    source = card.get("probes", {}).get("source", "")
    if source and source not in labels:
        raise ValueError(f"card.probes.source={source!r}; wanted one of {', '.join(labels)}")
    pairs = card.get("probes", {}).get("pairs", "")
    if pairs and not pairs.startswith("jsonl:"):
        raise ValueError(f"card.probes.pairs={pairs!r}; wanted 'jsonl:PATH'")


def _labels(config: ConfigDict) -> list[str]:
    """All sources of a run, those of training first, each once."""
    return list(dict.fromkeys([*config.sources, *config.eval.sources]))


def _check_said(path: str, section: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    """Raises a ValueError for the first key without a word in it."""
    for key, right in wanted.items():
        said = section.get(key, "")
        texts = [said] if isinstance(said, str) else list(said)
        if texts and all(isinstance(text, str) and text.strip() for text in texts):
            continue
        found = f"={said!r} says nothing" if key in section else " is missing"
        there = f"; {path} has {', '.join(sorted(section)) or 'nothing'}"
        raise ValueError(
            f"{path}.{key}{found}{'' if key in section else there}; wanted {right} "
            "('unknown' where nobody knows)"
        )


def data_facts(fit: Fit) -> list[dict[str, Any]]:
    """What is known of each source of a run, read and as the config names it.

    Files are hashed by process 0, which writes the card.
    """
    config, facts = fit.config, []
    for use, sections, opened in (
        ("training", config.sources, fit.sources),
        ("held out", config.eval.sources, fit.held_out),
    ):
        for label, section in sections.items():
            values = section.to_dict()
            facts.append(
                {
                    "label": label,
                    "use": use,
                    "kind": section.kind,
                    "name": section.name,
                    "split": values.get("split", "train"),
                    "records": len(opened[label]),
                    "records_of_source": opened[label].total,
                    "options": values.get("options") or {},
                    "read": {k: v for k, v in values.items() if k not in _PLAIN},
                    **(fingerprint(values) if jax.process_index() == 0 else {}),
                    **{key: config.card.sources[label][key] for key in _PROVENANCE},
                }
            )
    return facts


def fingerprint(section: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of a source's file, or of the options that its records are made from."""
    kind, _, rest = section["name"].partition(":")
    if kind == "jsonl":
        path = pathlib.Path(rest.replace("{split}", section.get("split", "train")))
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if kind == "tfds":
        return {}  # its name holds its version
    text = json.dumps(plain(section.get("options") or {}), sort_keys=True)
    return {"options_sha256": hashlib.sha256(text.encode()).hexdigest()}


def model_facts(fit: Fit) -> dict[str, Any]:
    """What the model is: base, shape, size, heads."""
    config, described, shapes = fit.config, fit.described, fit.model.shapes()
    start = config.model.get("init_from", "")
    return {
        "role": fit.role,
        "base": start or f"random weights of the size {config.model.name!r}",
        "from_random": not start,
        "tokenizer": config.data.tokenizer,
        "parameters": num_parameters(shapes),
        "trained_parameters": num_parameters(partition(shapes, described)[0]),
        "heads": list(described.score_heads),
        "members": described.members,
        "ensemble": described.ensemble,
        "config": dataclasses.asdict(described),
    }


def training_facts(config: ConfigDict) -> dict[str, Any]:
    """What the run minimised, and how."""
    joint = next((name for name in _JOINT if name in config.reward), "")
    losses = [
        {
            "source": label,
            "loss": _LOSSES[section.kind] + _JOINT.get(joint, {}).get(section.kind, ""),
            "head": section.get("head", ""),
            "weight": section.weight,
            "rows": section.rows,
        }
        for label, section in config.sources.items()
    ]
    return {
        "losses": losses,
        "centre_coef": config.updates.get("centre_coef", 0.0),
        "smoothing": config.updates.get("smoothing", 0.0),
        **({joint: config.reward[joint].to_dict()} if joint else {}),
        "optimizer": config.optimizer.to_dict(),
        "steps": config.train.steps,
        "seed": config.seed,
    }


def facts_of(
    fit: Fit,
    data: list[dict[str, Any]],
    evaluation: Mapping[str, float],
    probes: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of card.json.

    Args:
        data: see `data_facts`.
        evaluation: the run's last numbers on its held-out sources.
        probes: on which source and by which head, of how many records, and what was found.
    """
    card = fit.config.card
    return plain(
        {
            "model": model_facts(fit),
            "data": data,
            "training": training_facts(fit.config),
            "evaluation": {"held_out": dict(evaluation), "reports": {}},
            "probes": probes,
            "limits": list(card.limits),
            "licence": card.licence,
        }
    )


def probe_facts(found: Iterable[Finding]) -> list[dict[str, Any]]:
    """What stands in card.json of the findings."""
    findings = []
    for one in found:
        effect = {} if one.effect is None else one.effect._asdict()
        findings.append(
            {"name": one.name, "unit": one.unit, "reason": one.reason, **effect, **one.beside}
        )
    return findings


def write(folder: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """card.json and card.md, on process 0."""
    if jax.process_index() == 0:
        write_json(folder / JSON, facts)
        write_text(folder / MARKDOWN, page(facts))


def read(folder: str | pathlib.Path) -> dict[str, Any] | None:
    """The content of a run's card; None where it has none."""
    path = pathlib.Path(folder) / JSON
    return run_folder.read_json(path) if path.is_file() else None


def reported(report: pathlib.Path) -> dict[str, Any]:
    """What an evaluation found of a reward model; {} where it measured none.

    Args:
        report: the evaluation's folder.

    Raises:
        ValueError: it has no summary.json.
    """
    path = report / "summary.json"
    if not path.is_file():
        raise ValueError(f"{report} has no summary.json: no evaluation ended there")
    whole = run_folder.results(run_folder.read_json(path))
    models = ("outcome_model", "process_model")
    sets = (report / "report.json").is_file()  # of evaluate_reward, which measures nothing else
    return {n: x for n, x in whole.items() if "/" in n and (sets or n.split("/")[0] in models)}


def add_report(folder: pathlib.Path, name: str, found: Mapping[str, Any]) -> None:
    """Adds to the card in `folder` what an evaluation `found`, under its `name`.

    Raises:
        ValueError: there is no card.
    """
    facts = read(folder)
    if facts is None:
        raise ValueError(f"{folder} has no {JSON}: no reward model was trained there")
    facts["evaluation"]["reports"][name] = dict(found)
    write(folder, facts)


def card(
    *,
    workdir: Annotated[str, "Folder of a run that trained a reward model."],
    reports: Annotated[str, "Folders of evaluations of that model, with commas between them."],
) -> None:
    """Adds evaluations to the card of a reward model.

    Raises:
        ValueError: for a folder that is not of such a run, or evaluations of another model.
    """
    for report in filter(None, (one.strip() for one in reports.split(","))):
        with within(f"--reports={report!r}"):
            folder = pathlib.Path(report)
            _check_same(folder, workdir)
            found = reported(folder)
            if not found:
                raise ValueError("it has no numbers of a reward model")
            add_report(pathlib.Path(workdir), folder.name, found)
    _log.info("%s", pathlib.Path(workdir) / MARKDOWN)


def _check_same(report: pathlib.Path, workdir: str) -> None:
    """Raises a ValueError if the evaluation in a folder is one of another model."""
    path = report / "config.json"
    if not path.is_file():
        raise ValueError("it has no config.json: wanted the folder of an evaluation")
    named = run_folder.read_json(path).get("reward", {}).get("init_from", "")
    if not named or pathlib.Path(named).resolve() != pathlib.Path(workdir).resolve():
        raise ValueError(f"it measured reward.init_from={named!r}, not --workdir={workdir!r}")


if __name__ == "__main__":
    program.run_flags(card)
