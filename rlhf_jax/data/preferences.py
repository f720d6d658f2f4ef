"""Preferences and correctness labels for outcome reward models."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.balance import Augmented, balanced_indices, confident_indices
from rlhf_jax.data.draws import Drawn, Select
from rlhf_jax.data.examples import ExampleSource, Row, first_field, flag, pad_rows, share
from rlhf_jax.data.forms import Form
from rlhf_jax.data.sources import Record, RecordSource
from rlhf_jax.text.template import render
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Labelled, Pairs


class _Pair(NamedTuple):
    chosen: Row
    rejected: Row
    label: float
    margin: float
    votes: list[float]
    confidence: float


class _Judged(NamedTuple):
    row: Row
    label: float


def pairs(
    sources: Sequence[RecordSource],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    chat: str | None = None,
    max_length: int,
    seed: int,
    shuffle: bool = True,
    overlong: str = "error",
    chosen: tuple[str, ...] = ("chosen",),
    rejected: tuple[str, ...] = ("rejected",),
    annotators: int = 0,
    balance_lengths: bool = False,
    augment: float = 0.0,
    drop_unsure: float = 0.0,
) -> ExampleSource:
    """Batches of `Pairs`, each a prompt with a better and a worse completion.

    A record may have ``label`` (P(chosen is better), else 1), ``margin`` (else 0) and ``votes``: a
    list of one number from 0 to 1 per annotator, or None for no vote. ``chosen_truncated`` and
    ``rejected_truncated`` (true or false, else false) say that a completion was cut off and is not
    closed by end-of-text. ``Pairs.record`` is the record's index over all sources.

    Args:
        template, max_length, seed, shuffle, overlong: see `texts`; a pair is as long as its longer
            half.
        chat: in place of a template, the field that holds the prompt's messages; chosen and
            rejected are text or messages. Without that field in a record, they are conversations,
            and the prompt is how both begin.
        chosen, rejected: the first of these fields that a record has.
        annotators: A, the number of columns of votes.
        balance_lengths: "the longer wins" is right as often as wrong among the pairs that are
            kept; see `balanced_indices`. Lengths are those of the halves in tokens.
        augment: pairs with the answer to another prompt as the rejected side, per pair of a source;
            see `Augmented`. The prompt must be a field of its own.
        drop_unsure: the share of pairs of the lowest ``confidence``, a field of every record from 0
            to 1 (see `mean_confidence`), that is left out, before lengths are balanced.
    """
    for name, given in (("augment", augment), ("drop_unsure", drop_unsure)):
        if not 0 <= given < 1:
            raise ValueError(f"{name}={given}; wanted a share from 0 to below 1")
    form = Form(tokenizer, template=template, chat=chat)
    if augment:
        asks = functools.partial(_question, template, chat)
        fields = dict(chosen=chosen, rejected=rejected)
        sources = [Augmented(s, asks, share=augment, seed=seed, **fields) for s in sources]

    def encode(record: Record) -> _Pair:
        names = (first_field(record, chosen), first_field(record, rejected))
        return _encoded(form, record, names, annotators, sure=drop_unsure > 0)

    def collate(drawn: Sequence[Drawn]) -> Pairs:
        found = [one.encoded for one in drawn]
        return Pairs(
            chosen=pad_rows([pair.chosen for pair in found], max_length, tokenizer.pad_id),
            rejected=pad_rows([pair.rejected for pair in found], max_length, tokenizer.pad_id),
            label=np.array([pair.label for pair in found], np.float32),
            margin=np.array([pair.margin for pair in found], np.float32),
            votes=np.array([p.votes for p in found], np.float32).reshape(len(found), annotators),
            record=np.array([one.index for one in drawn], np.int32),
        )

    return ExampleSource(
        sources,
        encode,
        lambda pair: max(len(pair.chosen.tokens), len(pair.rejected.tokens)),
        collate,
        max_length=max_length,
        seed=seed,
        shuffle=shuffle,
        overlong=overlong,
        select=_selection(balance_lengths, drop_unsure, seed),
    )


def _encoded(form: Form, record: Record, names: tuple[str, str], annotators: int, sure: bool):
    """One pair; `sure`: the record says how much its label is to be believed."""
    cut = (flag(record, "chosen_truncated"), flag(record, "rejected_truncated"))
    better, worse = form.halves(record, names, cut)
    votes = record.get("votes", [])
    if len(votes) > annotators:
        raise ValueError(f"{len(votes)} votes but annotators={annotators}")
    votes = [np.nan if vote is None else float(vote) for vote in votes]
    return _Pair(
        chosen=better,
        rejected=worse,
        label=share(record, ("label",)) if "label" in record else 1.0,
        margin=float(record.get("margin", 0.0)),
        votes=votes + [np.nan] * (annotators - len(votes)),
        confidence=share(record, ("confidence",)) if sure else 1.0,
    )


def _selection(balance: bool, drop: float, seed: int) -> Select | None:
    """Which pairs are kept; None keeps all."""

    def select(found: Iterator[_Pair]) -> np.ndarray:
        facts = [(len(p.chosen.tokens), len(p.rejected.tokens), p.confidence) for p in found]
        lengths = np.array([fact[:2] for fact in facts], np.int64)
        kept = confident_indices(np.array([fact[2] for fact in facts]), drop=drop)
        return kept[balanced_indices(*lengths[kept].T, seed=seed)] if balance else kept

    return select if balance or drop else None


def _question(template: str | None, chat: str | None, record: Record) -> Any:
    """What a record asks: its prompt as text, or its messages."""
    if chat is None:
        return render(template or "", record)
    if chat not in record:
        raise ValueError(f"no field {chat}: augment needs prompts in a field of their own")
    return record[chat]


def correctness(
    sources: Sequence[RecordSource],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    chat: str | None = None,
    max_length: int,
    seed: int,
    shuffle: bool = True,
    overlong: str = "error",
    completion: tuple[str, ...] = ("completion", "solution"),
    label: tuple[str, ...] = ("label", "is_correct"),
) -> ExampleSource:
    """Batches of `Labelled`: completions that are right or wrong, or right with a probability.

    Args:
        template, max_length, seed, shuffle, overlong: see `texts`.
        chat: in place of a template, the field that holds the prompt's messages; completions are
            text or messages.
        completion, label: the first of these fields that a record has.
    """

    form = Form(tokenizer, template=template, chat=chat)

    def encode(record: Record) -> _Judged:
        return _Judged(form.row(record, completion), share(record, label))

    def collate(drawn: Sequence[Drawn]) -> Labelled:
        found = [one.encoded for one in drawn]
        return Labelled(
            texts=pad_rows([one.row for one in found], max_length, tokenizer.pad_id),
            label=np.array([one.label for one in found], np.float32),
        )

    return ExampleSource(
        sources,
        encode,
        lambda judged: len(judged.row.tokens),
        collate,
        max_length=max_length,
        seed=seed,
        shuffle=shuffle,
        overlong=overlong,
    )
