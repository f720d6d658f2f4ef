"""What a trained reward model is worth on held-out pairs, correctness and step labels."""

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import build, roles
from rlhf_jax.compile_watch import CompileWatch
from rlhf_jax.fit import check_rows, head_names
from rlhf_jax.mesh import fetch_host
from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.transformer import decoder
from rlhf_jax.ops.reward_metrics import (
    auc,
    balanced_accuracy,
    bootstrap_interval,
    pair_accuracy,
    pair_correct,
    wilson_interval,
)
from rlhf_jax.training.supervised import last_scores
from rlhf_jax.types import Labelled, Pairs, Steps, Texts

Score = Callable[[Texts, str], np.ndarray]


def report(config: ConfigDict, watch: CompileWatch) -> dict[str, float]:
    """Accuracy of the reward model of ``config.reward.init_from`` on ``config.reward.sources``.

    A source of kind pairs gives outcome_model/pair_accuracy and the accuracy of "the longer
    wins"; steps give process_model/step_auc, /balanced_accuracy and the majority rate;
    correctness gives outcome_model/correctness_auc. Intervals are 95 %, over pairs (Wilson) or
    texts (bootstrap); pairs and texts of one prompt count as independent.

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
        params = roles.load(folder, mesh, rules)
        forward = jax.jit(lambda params, texts: evaluate_texts(model, params, {}, texts).scores)
        for label, section in config.reward.sources.items():
            source = build.examples(f"reward.sources.{label}", section, text, config.seed)
            check_rows(f"reward.sources.{label}", section, source)
            batches = watch.loop(_batches(source, section.rows, mesh, rules))

            def score(texts: Texts, head: str) -> jax.Array:
                return forward(params, texts)[head]

            numbers |= KINDS[section.kind](batches, score, heads)
    return numbers


def _batches(source, rows: int, mesh, rules) -> Iterator:
    """Every whole batch of the source, once."""
    for first in range(0, len(source) - rows + 1, rows):
        yield build.fetch(mesh, rules, source, first, rows)


def _pairs(batches: Iterator[Pairs], score, heads: Mapping[str, str]) -> dict[str, float]:
    chosen, rejected, lengths = [], [], []
    for batch in batches:
        for texts, found in ((batch.chosen, chosen), (batch.rejected, rejected)):
            scores = last_scores(score(texts, heads["outcome_head"]), texts)
            found.append(fetch_host(scores))
        lengths.append(fetch_host((batch.chosen.mask.sum(-1), batch.rejected.mask.sum(-1))))
    better, worse = np.concatenate(chosen), np.concatenate(rejected)
    longer = [np.concatenate(side) for side in zip(*lengths, strict=True)]
    right = float(np.sum(pair_correct(better, worse)))
    low, high = wilson_interval(right, len(better))
    longest = pair_accuracy(longer[0].astype(np.float32), longer[1].astype(np.float32))
    return {
        "outcome_model/pair_accuracy": right / len(better),
        "outcome_model/pair_accuracy_low": low,
        "outcome_model/pair_accuracy_high": high,
        "outcome_model/longer_wins": longest,
        "outcome_model/shorter_wins": 1 - longest,
        "outcome_model/length_baseline": max(longest, 1 - longest),
    }


def _correctness(batches: Iterator[Labelled], score, heads: Mapping[str, str]) -> dict[str, float]:
    scores, labels = [], []
    for batch in batches:
        found = last_scores(score(batch.texts, heads["outcome_head"]), batch.texts)
        for value, into in ((found, scores), (batch.label, labels)):
            into.append(fetch_host(value))
    by_text = [np.concatenate(many)[:, None] for many in (scores, labels)]
    return _with_interval("outcome_model/correctness_auc", auc, *by_text)


def _steps(batches: Iterator[Steps], score, heads: Mapping[str, str]) -> dict[str, float]:
    scores, labels = [], []
    for batch in batches:
        found = score(batch.texts, heads["process_head"])
        found, wanted, ends = fetch_host((found, batch.labels, batch.step_ends & batch.texts.mask))
        for row, kept in enumerate(ends):
            scores.append(found[row, kept])
            labels.append(wanted[row, kept])
    share = float(np.mean(np.concatenate(labels) > 0.5))
    return {
        **_with_interval("process_model/step_auc", auc, scores, labels),
        **_with_interval("process_model/balanced_accuracy", balanced_accuracy, scores, labels),
        "process_model/majority_rate": max(share, 1 - share),
    }


def _with_interval(name: str, statistic, scores, labels) -> dict[str, float]:
    """A statistic of scores and labels, an array for each text, and its 95 % interval."""
    low, high = bootstrap_interval(statistic, scores, labels)
    value = statistic(np.concatenate(scores), np.concatenate(labels))
    return {name: value, f"{name}_low": low, f"{name}_high": high}


KINDS = {"pairs": _pairs, "correctness": _correctness, "steps": _steps}
