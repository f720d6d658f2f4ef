"""Reward sets as rows of tokens: what is scored, and what is left out and counted."""

import collections
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data.examples import Row
from rlhf_jax.data.forms import Form
from rlhf_jax.data.plain_forms import (
    NO_ERROR,
    Pair,
    Prompt,
    Samples,
    Solution,
    check_item,
)
from rlhf_jax.data.process_sets import find_form
from rlhf_jax.data.record_files import open_records
from rlhf_jax.data.reward_sets import joined
from rlhf_jax.data.sources import RecordSource, place
from rlhf_jax.ops.reward_metrics import within_pass_rates
from rlhf_jax.schema import within
from rlhf_jax.text.steps import BLANK, split_steps
from rlhf_jax.text.tokenizer import Tokenizer

OVERLONG = ("skip", "truncate", "error")
_SOURCE = ("name", "split", "data_dir", "options")


class Entry(NamedTuple):
    """One item of a set and its rows: two of a pair, one of each sample, one of a solution."""

    record: int
    item: Pair | Samples | Solution
    rows: list[Row]


class RewardSet(NamedTuple):
    """A set as it is scored.

    `counts` says what was read, what was left out and why; `kind` is pairs, samples or solutions.
    """

    label: str
    form: str
    kind: str
    entries: list[Entry]
    counts: dict[str, int]

    @property
    def groups(self) -> np.ndarray:
        """A number for each entry, the same for entries of one prompt."""
        keys = [json.dumps(entry.item.prompt) for entry in self.entries]
        return np.unique(keys, return_inverse=True)[1]


def read_set(
    label: str, section: ConfigDict, data: ConfigDict, text: Tokenizer, *, asked: bool = False
) -> RewardSet:
    """Reads and encodes one section of ``reward_sets``; touches no device.

    Args:
        asked: items whose prompt has no token are left out and counted, as an advantage model has
            no score of them; see `rlhf_jax.data.examples.check_prompt`.

    Raises:
        ValueError: naming the section, and file and line where a record is not of the form; where
            nothing is left that could be measured.
    """
    path = f"reward_sets.{label}"
    with within(path):
        kind, read = find_form(section.form)
        if data.overlong not in OVERLONG:
            raise ValueError(f"data.overlong={data.overlong!r}; known: {', '.join(OVERLONG)}")
        own = {key: section[key] for key in ("template", "chat") if section.get(key) is not None}
        written = own or {key: data.get(key) for key in ("template", "chat")}
        form = Form(text, template=written.get("template"), chat=written.get("chat"))
        values = {key: section[key] for key in _SOURCE if key in section}
        options = values.pop("options", None)
        source = open_records(**values, options=None if options is None else options.to_dict())
        counts: collections.Counter[str] = collections.Counter()
        limit = section.get("limit", 0)
        if limit < 0:
            raise ValueError(f"limit={limit}; wanted a number of records, or 0 for all")
        if kind == "samples":  # of prompts, which may be spread over several records
            items = _items(source, read, 0, counts)
            items = _spread(_sampled(items, section.get("pass_rates", (0.0, 1.0)), counts), limit)
        else:
            items = _items(source, read, limit, counts)
        entries = []
        for record, item in items:
            with within(place(source, record)):
                found = _encode(form, item, data, counts, asked)
            if found is not None:
                entries.append(Entry(record, *found))
    counts["used"] = len(entries)
    found = RewardSet(label, section.form, kind, entries, dict(counts))
    _check(found, path)
    return found


def _items(source: RecordSource, read, limit: int, counts) -> list[tuple[int, Any]]:
    """The items of the records with the records' numbers; a limit spreads over all of them."""
    items = []
    for record in _spread(range(len(source)), limit):
        with within(place(source, record)):
            found = read(source[record])
            for item in found:
                check_item(item)
        counts["records"] += 1
        counts["unlabelled"] += not found
        items += [(record, item) for item in found]
    return items


def _spread(items: Sequence[Any], limit: int) -> Sequence[Any]:
    """`limit` of the items or fewer, over all of them; 0 takes all."""
    if not limit:
        return items
    return [items[int(i)] for i in np.unique(np.linspace(0, len(items) - 1, limit).astype(int))]


def _sampled(items: list[tuple[int, Samples]], pass_rates: Sequence[float], counts):
    """Samples put together by prompt, without prompts that are right too seldom or too often."""
    if len(pass_rates) != 2 or not 0 <= pass_rates[0] <= pass_rates[1] <= 1:
        raise ValueError(f"pass_rates={tuple(pass_rates)}; wanted two shares from 0 to 1")
    found = joined([item for _, item in items])
    if len(found) == len(items):
        numbered = items
    else:
        first = {repr(item.prompt): record for record, item in reversed(items)}
        numbered = [(first[repr(item.prompt)], item) for item in found]
    for item in found:
        right, wrong = (
            {text for text, bit in zip(item.completions, item.correct, strict=True) if bit == told}
            for told in (True, False)
        )
        counts["right_and_wrong"] += bool(right & wrong)  # one text, told both ways
    low, high = pass_rates
    correct = [np.asarray(item.correct) for item in found]
    kept = within_pass_rates(correct, low=low, high=high)
    counts["outside_pass_rates"] += int((~kept).sum())
    return [one for one, keep in zip(numbered, kept, strict=True) if keep]


def _encode(
    form: Form, item: Any, data: ConfigDict, counts, asked: bool
) -> tuple[Any, list[Row]] | None:
    """The item and its rows, None where it is left out; counts why."""
    if isinstance(item, Solution):
        item = _visible_steps(item)
        if item is None:
            counts["blank_wrong_step"] += 1
            return None
        texts = ["\n".join(item.steps)]
    elif isinstance(item, Pair):
        texts = [item.chosen, item.rejected]
        counts["ties"] += item.tie
        if item.chosen == item.rejected:
            counts["equal_sides"] += 1
            return None
    else:
        texts = list(item.completions)
    empty = any(not text.strip(BLANK) for text in texts)
    counts["empty"] += empty
    if empty and not data.end_of_text:
        return None  # no token of theirs could be scored
    rows = [_row(form, item.prompt, text, data.end_of_text) for text in texts]
    if asked and not all(row.prompt for row in rows):
        counts["no_prompt"] += 1
        return None
    limit, longest = data.max_length, max(len(row.tokens) for row in rows)
    if any(row.prompt >= limit for row in rows):
        counts["prompt_fills_window"] += 1
        return None
    if longest <= limit:
        return item, rows
    if data.overlong == "error":
        raise ValueError(
            f"{longest} tokens but data.max_length={limit}; set data.overlong to skip or truncate"
        )
    counts["overlong"] += 1
    if data.overlong == "skip" or isinstance(item, Solution):
        return None
    cut = [row._replace(tokens=row.tokens[:limit]) for row in rows]
    if isinstance(item, Pair) and cut[0] == cut[1]:
        counts["equal_sides"] += 1
        return None
    return item, cut


def _row(form: Form, prompt: Prompt, text: str, ended: bool) -> Row:
    """Prompt and completion as in training: the prompt is the field "prompt" of a record."""
    return form.written({"prompt": prompt}, text, truncated=not ended)


def _visible_steps(item: Solution) -> Solution | None:
    """The solution without blank steps, as in training; None if the first wrong one is blank."""
    kept = [i for i, step in enumerate(item.steps) if step.strip(BLANK)]
    if not kept or (item.first_wrong != NO_ERROR and item.first_wrong not in kept):
        return None
    return item._replace(
        steps=[item.steps[i] for i in kept],
        labels=[item.labels[i] for i in kept],
        first_wrong=NO_ERROR if item.first_wrong == NO_ERROR else kept.index(item.first_wrong),
    )


def step_lines(item: Solution) -> list[int]:
    """The line of the solution on which each step ends: there it has its score."""
    return [int(end) - 1 for end in np.cumsum([len(split_steps(step)) for step in item.steps])]


def _check(found: RewardSet, path: str) -> None:
    """Raises a ValueError where nothing sensible could be said of a set."""
    said = ", ".join(f"{count} {name}" for name, count in found.counts.items() if count)
    if not found.entries:
        raise ValueError(f"{path}: nothing is left to score ({said})")
    items = [entry.item for entry in found.entries]
    if found.kind == "pairs" and all(item.tie for item in items):
        raise ValueError(f"{path}: all pairs are ties ({said}); wanted some with a better side")
    if found.kind == "samples":
        bits = {bool(bit) for item in items for bit in item.correct}
        if len(bits) < 2:
            which = "right" if bits == {True} else "wrong"
            raise ValueError(f"{path}: all samples are {which} ({said}); wanted both")
    if found.kind == "solutions" and all(x is None for item in items for x in item.labels):
        raise ValueError(f"{path}: no step has a label ({said})")
