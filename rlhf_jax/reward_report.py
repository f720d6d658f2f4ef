"""What a trained reward model is worth on held-out pairs, correctness and step labels."""

import functools
import logging
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import averages, build, roles
from rlhf_jax.compile_watch import CompileWatch
from rlhf_jax.fit import check_rows, head_names
from rlhf_jax.mesh import fetch_host
from rlhf_jax.models.completions import evaluate_texts, text_scores
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import OUTCOME_HEAD, is_advantage
from rlhf_jax.models.transformer import decoder
from rlhf_jax.ops.reward_metrics import (
    auc,
    balanced_accuracy,
    bootstrap_interval,
    clustered_interval,
    pair_correct,
)
from rlhf_jax.schema import within
from rlhf_jax.types import Labelled, Pairs, Steps, Texts

_log = logging.getLogger(__name__)


def report(config: ConfigDict, watch: CompileWatch) -> dict[str, float]:
    """Accuracy of the reward model of ``config.reward.init_from`` on ``config.reward.sources``.

    A source of kind pairs gives outcome_model/pair_accuracy (undecided labels left out) and the
    accuracy of "the longer wins"; steps give process_model/step_auc, /balanced_accuracy and the
    majority rate; correctness gives outcome_model/correctness_auc. Where two sources are of one
    kind, the names of both begin with the source's. Intervals are 95 %, over prompts: Wilson's for
    accuracies, else by a bootstrap. Of an advantage model r − e is measured, as `score` writes it
    and a policy run is paid by it; the numbers that its own run logged are of r.

    Args:
        watch: counts what is compiled once the batches of a source are warm.
    """
    text = build.tokenizer(config)
    mesh, rules = build.mesh(config)
    folder = config.reward.init_from
    described = roles.loaded_config(folder)
    model = decoder(described, rules)
    heads = {"outcome_head": "outcome", "process_head": "process"} | head_names(described)
    numbers: dict[str, float] = {}
    with jax.set_mesh(mesh):
        params = averages.load(averages.folders_of(config.reward), mesh, rules)
        forward = jax.jit(lambda params, texts: evaluate_texts(model, params, {}, texts).scores)
        for label, section in config.reward.sources.items():
            source = build.examples(f"reward.sources.{label}", section, text, config.seed)
            check_rows(f"reward.sources.{label}", section, source)
            batches = watch.loop(_batches(source, section.rows, mesh, rules))
            own = dict.fromkeys(heads, section.head) if "head" in section else {}
            check_prompts(f"reward.sources.{label}", section.kind, source, described, heads | own)
            score = functools.partial(forward, params)
            found = KINDS[section.kind](batches, score, heads | own)
            shared = sum(one.kind == section.kind for one in config.reward.sources.values()) > 1
            numbers |= {f"{label}/{name}" if shared else name: x for name, x in found.items()}
    return numbers


def check_prompts(path, kind, source, described: ModelConfig, heads: Mapping[str, str]) -> None:
    """Raises a ValueError for a record whose score needs a prompt that it has not."""
    texts = kind != "steps" and heads["outcome_head"] == OUTCOME_HEAD
    if texts and is_advantage(described.score_heads):
        with within(path):
            source.check_prompts()


def _batches(source, rows: int, mesh, rules) -> Iterator[tuple[Pairs | Labelled | Steps, int]]:
    """Every record of the source, once: batches, and how many rows of each count."""
    for first in range(0, len(source), rows):
        kept = min(rows, len(source) - first)  # behind them the next epoch begins
        yield build.fetch(mesh, rules, source, first, rows), kept


def _host(kept: int, arrays):
    """The rows that count, on the host."""
    return jax.tree.map(lambda x: x[:kept], fetch_host(arrays))


def _prompts(kept: int, texts: Texts) -> list[bytes]:
    """What stands before each text's completion: the same for texts of one prompt."""
    tokens, asks = _host(kept, (texts.tokens, texts.mask & ~texts.loss_mask))
    return [row[place].tobytes() for row, place in zip(tokens, asks, strict=True)]


def _pairs(batches: Iterator[tuple[Pairs, int]], score, heads: Mapping[str, str]):
    sides: dict[str, list] = {"chosen": [], "rejected": []}
    labels, lengths, prompts = [], [], []
    for batch, kept in batches:
        halves = {"chosen": batch.chosen, "rejected": batch.rejected}
        for name, texts in halves.items():
            scores = text_scores(score(texts), texts, heads["outcome_head"])
            sides[name].append(_host(kept, scores))
        lengths.append(_host(kept, [texts.mask.sum(-1) for texts in halves.values()]))
        labels.append(_host(kept, batch.label))
        prompts += _prompts(kept, batch.chosen)
    label = np.concatenate(labels)
    decided = label != 0.5
    if not decided.any():
        raise ValueError(f"all {len(label)} held-out pairs are undecided (label 0.5)")
    size = [np.concatenate(side).astype(np.float32) for side in zip(*lengths, strict=True)]

    def agrees(chosen, rejected):
        right = np.asarray(pair_correct(chosen, rejected), np.float64)
        return np.where(label > 0.5, right, 1 - right)[decided]

    right = agrees(*(np.concatenate(found) for found in sides.values()))
    longest = float(agrees(*size).mean())
    low, high = clustered_interval(right, np.array(prompts, object)[decided])
    return {
        "outcome_model/pair_accuracy": float(right.mean()),
        "outcome_model/pair_accuracy_low": low,
        "outcome_model/pair_accuracy_high": high,
        "outcome_model/longer_wins": longest,
        "outcome_model/shorter_wins": 1 - longest,
        "outcome_model/length_baseline": max(longest, 1 - longest),
    }


def _correctness(batches: Iterator[tuple[Labelled, int]], score, heads: Mapping[str, str]):
    scores, labels, prompts = [], [], []
    for batch, kept in batches:
        found = text_scores(score(batch.texts), batch.texts, heads["outcome_head"])
        for value, into in ((found, scores), (batch.label, labels)):
            into.append(_host(kept, value))
        prompts += _prompts(kept, batch.texts)
    by_text = [np.concatenate(many)[:, None] for many in (scores, labels)]
    return _with_interval("outcome_model/correctness_auc", auc, *by_text, prompts)


def _steps(batches: Iterator[tuple[Steps, int]], score, heads: Mapping[str, str]):
    scores, labels, prompts = [], [], []
    for batch, kept in batches:
        said = score(batch.texts)[heads["process_head"]]
        ends = batch.step_ends & batch.texts.mask
        found, wanted, marked = _host(kept, (said, batch.labels, ends))
        for row, places in enumerate(marked):
            scores.append(found[row, places])
            labels.append(wanted[row, places])
        prompts += _prompts(kept, batch.texts)
    share = float(np.mean(np.concatenate(labels) > 0.5))
    name = "process_model/balanced_accuracy"
    return {
        **_with_interval("process_model/step_auc", auc, scores, labels, prompts),
        **_with_interval(name, balanced_accuracy, scores, labels, prompts),
        "process_model/majority_rate": max(share, 1 - share),
    }


def _with_interval(name: str, statistic, scores, labels, prompts) -> dict[str, float]:
    """A statistic of scores and labels, an array for each text, and its 95 % interval."""
    together = {}
    for place, prompt in enumerate(prompts):
        together.setdefault(prompt, []).append(place)
    grouped = [
        [np.concatenate([many[i] for i in places]) for places in together.values()]
        for many in (scores, labels)
    ]
    low, high = bootstrap_interval(statistic, *grouped)
    value = statistic(*map(np.concatenate, grouped))
    if np.isnan(value):
        _log.warning("%s cannot be said: all labels are of one class", name)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


KINDS = {"pairs": _pairs, "correctness": _correctness, "steps": _steps}
