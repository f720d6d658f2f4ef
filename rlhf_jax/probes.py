"""Probes of a reward model: texts of equal quality that differ in one thing, and how scores move.

    length          a text with empty closing sentences behind it: reward per token, within a text
    length_in_pairs preference pairs as they are: reward per token beside a constant for quality
    format          every sentence as an item of a list, less the plain text
    sycophancy      a text that opens with agreement, less one with a neutral opening
    refusal         an empty refusal in place of a good answer, less the answer
    consistency     share of pairs whose order stays where both sides get the same neutral opening
    prompt_offset   share of the variance of scores that lies between prompts
    pairs/<name>    a file of one's own: `changed` less `original`, by the name of its probe

Texts are those of one source of the run; changes are words, so a tokenizer without letters has the
probes that change nothing, and says so of the others. Numbers are those of `rlhf_jax.ops.probes`.
"""

import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rlhf_jax.data.examples import ExampleSource, Row, check_prompt, pick
from rlhf_jax.data.forms import Form
from rlhf_jax.data.sources import Record, RecordSource, place
from rlhf_jax.ops import probes as numbers
from rlhf_jax.ops.probes import Effect
from rlhf_jax.schema import within
from rlhf_jax.text.changes import AGREEING, FILLERS, NEUTRAL, REFUSAL, bulleted, lengthened, opened
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Pairs, Texts

Tokens = tuple[int, ...]


class Text(NamedTuple):
    """A prompt and a completion as tokens; `tail` is what closes the completion, if anything."""

    prompt: Tokens
    completion: Tokens
    tail: Tokens

    @property
    def whole(self) -> Tokens:
        """All of it, as it is scored."""
        return self.prompt + self.completion + self.tail


Score = Callable[[Sequence[Text]], list[float]]  # of whole texts


class Item(NamedTuple):
    """A record: a text, and the worse one beside it where it is a pair."""

    text: Text
    worse: Text | None = None


class Finding(NamedTuple):
    """What a probe found, or why it cannot be asked.

    unit: of the number; effect: the number; reason: in its place; beside: further numbers.
    """

    name: str
    unit: str = ""
    effect: Effect | None = None
    reason: str = ""
    beside: Mapping[str, float] = types.MappingProxyType({})


class Asked(NamedTuple):
    """A probe with its texts: `rows` are [M forms], `groups` says which rows share a prompt."""

    name: str
    unit: str
    rows: list[list[Text]]
    groups: list[Any]
    conclude: Callable[..., Any]


def read_items(source: ExampleSource, limit: int, tokenizer: Tokenizer) -> list[Item]:
    """The first records that a source draws, at most `limit`."""
    count = min(limit, len(source))
    batch = source.batch(0, slice(0, count), count)
    special = [text is None for text in tokenizer.token_texts()]
    if isinstance(batch, Pairs):
        sides = (_texts(side, special) for side in (batch.chosen, batch.rejected))
        return [Item(*pair) for pair in zip(*sides, strict=True)]
    texts = batch if isinstance(batch, Texts) else batch.texts
    return [Item(text) for text in _texts(texts, special)]


def _texts(texts: Texts, special: Sequence[bool]) -> list[Text]:
    """Rows cut where the completion, and where the special tokens behind it begin."""
    found = []
    for tokens, mask, trains in zip(texts.tokens, texts.mask, texts.loss_mask, strict=True):
        kept = tuple(int(token) for token in tokens[mask])
        start = int(np.argmax(trains)) if trains.any() else len(kept)
        end = len(kept)
        while end > start and special[kept[end - 1]]:
            end -= 1
        found.append(Text(kept[:start], kept[start:end], kept[end:]))
    return found


def read_pairs(
    records: RecordSource, form: Form, tokenizer: Tokenizer, *, prompted: bool = False
) -> list[Asked]:
    """Probes from a file of one's own: lines with `probe`, `original`, `changed` and a prompt.

    ``changed_prompt`` takes the place of ``prompt`` for the changed text, for paraphrases.

    Args:
        prompted: prompts must have tokens; see `rlhf_jax.data.examples.check_prompt`.

    Raises:
        ValueError: naming file and line of what is no such pair.
    """
    special = [text is None for text in tokenizer.token_texts()]
    found: dict[str, Asked] = {}
    for number in range(len(records)):
        record = records[number]
        with within(place(records, number)):
            name = pick(record, ("probe",))
            rows = [_written(form, record, field) for field in ("original", "changed")]
            for row in rows if prompted else ():
                check_prompt(row)
            sides = [_text(row, special) for row in rows]
        asked = found.setdefault(name, Asked(f"pairs/{name}", "reward", [], [], _difference))
        asked.rows.append(sides)
        asked.groups.append(sides[0].prompt)
    return list(found.values())


def _written(form: Form, record: Record, field: str) -> Row:
    """One side of a pair of one's own."""
    if field == "changed" and "changed_prompt" in record:
        record = record | {form.chat or "prompt": record["changed_prompt"]}
    return form.written(record, pick(record, (field,)))


def _text(row: Row, special: Sequence[bool]) -> Text:
    """A row cut where the completion, and where the special tokens behind it begin."""
    end = len(row.tokens)
    while end > row.prompt and special[row.tokens[end - 1]]:
        end -= 1
    kept = tuple(row.tokens)
    return Text(kept[: row.prompt], kept[row.prompt : end], kept[end:])


def probe(
    items: Sequence[Item],
    asked: Sequence[Asked],
    tokenizer: Tokenizer,
    score: Score,
    *,
    widest: float | int = math.inf,
) -> list[Finding]:
    """All findings: the probes made of `items`, and those of `asked`.

    Args:
        score: scores whole texts; it is called once, with every text once.
        widest: records of which a form is longer, in tokens, are left out of that probe.
    """
    made, refused = _made(items, tokenizer)
    every = [_fitting(one, widest) for one in (*made, *asked)]
    unique = dict.fromkeys(text for one in every for row in one.rows for text in row)
    scored = dict(zip(unique, score(list(unique)), strict=True))
    if not np.isfinite(list(scored.values())).all():
        return [Finding("all", reason="a score of the model is not finite")]
    found = {one.name: _found(one, scored) for one in every} | refused
    order = ("length", "length_in_pairs", "format", "sycophancy", "refusal", "consistency")
    order = (*order, "prompt_offset", *(one.name for one in asked))
    return [found[name] for name in order]


def _found(asked: Asked, scored: Mapping[Text, float]) -> Finding:
    """One probe from the scores of its texts."""
    if not asked.rows:
        return Finding(asked.name, reason="all texts are longer than the model's positions")
    scores = np.array([[scored[text] for text in row] for row in asked.rows], np.float64)
    lengths = np.array([[len(t.completion) for t in row] for row in asked.rows], np.int64)
    names = {group: number for number, group in enumerate(dict.fromkeys(asked.groups))}
    groups = np.array([names[group] for group in asked.groups])
    try:
        effect, beside = asked.conclude(scores, lengths, groups)
    except ValueError as error:  # too few prompts, or nothing that varies: said, not numbered
        return Finding(asked.name, reason=str(error))
    return Finding(asked.name, asked.unit, effect, beside=beside)


def _fitting(asked: Asked, widest: float | int) -> Asked:
    kept = [i for i, row in enumerate(asked.rows) if max(len(t.whole) for t in row) <= widest]
    rows, groups = ([values[i] for i in kept] for values in (asked.rows, asked.groups))
    return asked._replace(rows=rows, groups=groups)


def _made(items: Sequence[Item], tokenizer: Tokenizer) -> tuple[list[Asked], dict[str, Finding]]:
    """The probes that can be made of records, and the others with the reason why not."""
    every = [text for item in items for text in (item.text, item.worse) if text is not None]
    prompts = [item.text.prompt for item in items]
    pairs = [item for item in items if item.worse is not None]
    own = [item.text.prompt for item in pairs]
    made = [
        Asked("prompt_offset", "share", [[t] for t in every], [t.prompt for t in every], _offset)
    ]
    refused = {}
    no_pairs = "the source has no pairs"
    if pairs:
        sides = [[item.text, item.worse] for item in pairs]
        made.append(Asked("length_in_pairs", "reward per token", sides, own, _pair_slope))
    else:
        refused["length_in_pairs"] = Finding("length_in_pairs", reason=no_pairs)
    changed = _changes(items, pairs, prompts, own)
    words = "".join((*FILLERS, NEUTRAL, AGREEING, REFUSAL, "\n- "))
    reason = _unwritable(tokenizer, words)
    for name, (unit, texts, groups, conclude) in changed.items():
        if reason or not texts:
            refused[name] = Finding(name, reason=reason or no_pairs)
            continue
        rows = [[_rewritten(text, change, tokenizer) for text, change in row] for row in texts]
        made.append(Asked(name, unit, rows, groups, conclude))
    return made, refused


def _changes(items, pairs, prompts, own) -> dict[str, tuple[str, list, list, Callable]]:
    """Of the probes that change texts: unit, rows of (text, change), groups, conclusion."""

    def forms(*changes):
        return [[(item.text, change) for change in changes] for item in items]

    def same(text: str) -> str:
        return text

    def refusal(text: str) -> str:
        return REFUSAL

    closings = [functools.partial(lengthened, fillers=k) for k in range(len(FILLERS) + 1)]
    neutral, agreeing = (functools.partial(opened, opening=o) for o in (NEUTRAL, AGREEING))
    both = [[(i.text, same), (i.worse, same), (i.text, neutral), (i.worse, neutral)] for i in pairs]
    # Every text is a group of its own: the slope is within a text.
    alone = list(range(len(items)))
    return {
        "length": ("reward per token", forms(*closings), alone, _slope),
        "format": ("reward", forms(same, bulleted), prompts, _difference),
        "sycophancy": ("reward", forms(neutral, agreeing), prompts, _difference),
        "refusal": ("reward", forms(same, refusal), prompts, _difference),
        "consistency": ("share", both, own, _kept),
    }


def _unwritable(tokenizer: Tokenizer, words: str) -> str:
    """Why a tokenizer cannot write words; "" where it can."""
    try:
        again = tokenizer.decode(tokenizer.encode(words))
    except ValueError:
        return "the tokenizer has no letters for the words that the probe adds"
    if again.split() != words.split():
        return "the tokenizer does not give back the words that the probe adds"
    return ""


def _rewritten(text: Text, change: Callable[[str], str], tokenizer: Tokenizer) -> Text:
    """The text with its completion changed; all forms of a text are encoded in the same way."""
    said = change(tokenizer.decode(text.completion))
    return text._replace(completion=tuple(tokenizer.encode(said)))


Conclusion = tuple[Effect, dict[str, float]]


def _slope(scores: Float[np.ndarray, "M K"], lengths, groups) -> Conclusion:
    each = np.repeat(groups, scores.shape[1])
    return numbers.within_slope(scores.ravel(), lengths.ravel(), each), {}


def _pair_slope(scores: Float[np.ndarray, "M 2"], lengths, groups) -> Conclusion:
    gap, further = scores[:, 0] - scores[:, 1], lengths[:, 0] - lengths[:, 1]
    return numbers.pair_slope(gap, further, groups), {}


def _difference(scores: Float[np.ndarray, "M 2"], lengths, groups) -> Conclusion:
    gap = scores[:, 1] - scores[:, 0]
    higher = {"share_higher": float(np.mean(0.5 + 0.5 * np.sign(gap)))}
    return numbers.mean_effect(gap, groups), higher


def _kept(scores: Float[np.ndarray, "M 4"], lengths, groups) -> Conclusion:
    first, then = scores[:, 0] - scores[:, 1], scores[:, 2] - scores[:, 3]
    return numbers.kept_preference(first, then, groups), {}


def _offset(scores: Float[np.ndarray, "M 1"], lengths, groups) -> Conclusion:
    found = numbers.prompt_offset(scores[:, 0], groups)
    return found.share, {"between": found.between, "within": found.within}
