"""Preferences and correctness labels for outcome reward models."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.balance import Augmented, balanced_indices, confident_indices
from rlhf_jax.data.draws import Drawn, Flaw, Select
from rlhf_jax.data.examples import (
    ExampleSource,
    Judged,
    Row,
    first_field,
    flag,
    number,
    pad_rows,
    share,
    warn_of_one_class,
    wordless,
)
from rlhf_jax.data.forms import Form
from rlhf_jax.data.sources import Record, RecordSource
from rlhf_jax.text.template import render
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Labelled, Pairs

VOTES = ("mean", "majority")


class _Pair(NamedTuple):
    chosen: Row
    rejected: Row
    label: float
    margin: float
    votes: list[float]
    confidence: float


def label_from_votes(votes: Sequence[float | int | None], *, how: str = "mean") -> float | None:
    """P(chosen is better) from what annotators said, each from 0 to 1; None: nobody voted.

    The mean is a soft label: it keeps how much they disagree, and a Bradley-Terry fit to it has the
    weights that single votes have. The majority is 1, 0, or ½ where as many are for either side; a
    fit to it is surer than any annotator.
    """
    cast = [vote for vote in votes if vote is not None]
    if not cast:
        return None
    if how == "mean":
        return sum(cast) / len(cast)
    balance = sum(vote > 0.5 for vote in cast) - sum(vote < 0.5 for vote in cast)
    return 0.5 + 0.5 * ((balance > 0) - (balance < 0))


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
    votes: str = "mean",
    balance_lengths: bool = False,
    augment: float = 0.0,
    drop_unsure: float = 0.0,
) -> ExampleSource:
    """Batches of `Pairs`, each a prompt with a better and a worse completion.

    A record may have ``label`` (P(chosen is better)), ``margin`` (else 0) and ``votes``: a list of
    one number from 0 to 1 per annotator (1: chosen is better), or None for no vote. Without a
    ``label`` the votes make it; without either it is 1. ``chosen_truncated`` and
    ``rejected_truncated`` (true or false, else false) say that a completion was cut off and is not
    closed by end-of-text. ``Pairs.record`` is the record's index over all sources.

    Pairs with two equal sides, and those with a side of which no token is left, are counted,
    reported and left out; empty completions are counted and reported.

    Args:
        template, max_length, seed, shuffle, overlong: see `texts`; a pair is as long as its longer
            half.
        chat: in place of a template, the field that holds the prompt's messages; chosen and
            rejected are text or messages. Without that field in a record, they are conversations,
            and the prompt is how both begin.
        chosen, rejected: the first of these fields that a record has.
        annotators: A, the number of columns of votes.
        votes: how they make a label, "mean" or "majority"; see `label_from_votes`.
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
    if votes not in VOTES:
        raise ValueError(f"votes={votes!r}; known: {', '.join(VOTES)}")
    form = Form(tokenizer, template=template, chat=chat)
    if augment:
        asks = functools.partial(_question, template, chat)
        fields = dict(chosen=chosen, rejected=rejected)
        sources = [Augmented(s, asks, share=augment, seed=seed, **fields) for s in sources]

    def encode(record: Record) -> _Pair:
        names = (first_field(record, chosen), first_field(record, rejected))
        cast = _read_votes(record, annotators)
        return _encoded(form, record, names, cast, how=votes, sure=drop_unsure > 0)

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
        flaw=functools.partial(_pair_flaw, max_length, tokenizer.eos_ids),
    )


def _encoded(
    form: Form,
    record: Record,
    names: tuple[str, str],
    votes: list[float | int | None],
    *,
    how: str,
    sure: bool,
) -> _Pair:
    """One pair; `how`: what makes a label of its votes; `sure`: the record says how much its label
    is to be believed."""
    cut = (flag(record, "chosen_truncated"), flag(record, "rejected_truncated"))
    better, worse = form.halves(record, names, cut)
    voted = label_from_votes(votes, how=how)
    label = share(record, ("label",)) if "label" in record else voted
    return _Pair(
        chosen=better,
        rejected=worse,
        label=1.0 if label is None else label,
        margin=number(record, "margin", 0.0),
        votes=[np.nan if vote is None else float(vote) for vote in votes],
        confidence=share(record, ("confidence",)) if sure else 1.0,
    )


def _read_votes(record: Record, annotators: int) -> list[float | int | None]:
    """A record's votes, one per annotator; None for no vote."""
    given = record.get("votes", [])
    listed = isinstance(given, list | tuple)
    good = listed and all(
        vote is None or (isinstance(vote, bool | int | float) and 0 <= vote <= 1) for vote in given
    )
    if not good:
        raise ValueError(f"field 'votes' holds {given!r}, not numbers from 0 to 1 or null")
    if len(given) > annotators:
        raise ValueError(f"{len(given)} votes but annotators={annotators}")
    return [*given, *[None] * (annotators - len(given))]


def _pair_flaw(max_length: int, eos_ids: Sequence[int], pair: _Pair) -> Flaw | None:
    """What is wrong with a pair; useless before harmless."""
    cut = (pair.chosen.tokens[:max_length], pair.rejected.tokens[:max_length])
    found = [wordless(half, max_length, eos_ids) for half in (pair.chosen, pair.rejected)]
    worst = next((one for one in found if one is not None and one.useless), None)
    if worst is None and cut[0] == cut[1]:
        return Flaw("pairs with two equal sides", useless=True)
    return worst or found[0] or found[1]


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

    Completions of which no token is left are counted, reported and left out; empty ones, and
    labels of one class only, are counted and reported.

    Args:
        template, max_length, seed, shuffle, overlong: see `texts`.
        chat: in place of a template, the field that holds the prompt's messages; completions are
            text or messages.
        completion, label: the first of these fields that a record has.
    """

    form = Form(tokenizer, template=template, chat=chat)

    def encode(record: Record) -> Judged:
        return Judged(form.row(record, completion), share(record, label))

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
        select=warn_of_one_class,
        flaw=lambda judged: wordless(judged.row, max_length, tokenizer.eos_ids),
    )
