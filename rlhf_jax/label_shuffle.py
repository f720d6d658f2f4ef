"""A control for experiments with reward models: the same texts with labels that say nothing.

What a policy gains from a reward model that was trained on shuffled labels, it did not learn from
the labels (as in the randomisation test of Zhang et al., 2017, https://arxiv.org/abs/1611.03530).
"""

import random
import re
from collections.abc import Mapping
from typing import Any

Lines = list[dict[str, Any]]


def shuffled(rows: Mapping[str, Lines], rng: random.Random) -> dict[str, Lines]:
    """``rows`` by file with labels dealt out anew over the lines of a file; texts stay.

    The sides of a pair are exchanged at random. Held-out files keep their labels: they say what
    is true.
    """
    return {
        name: lines if name.startswith("held_out_") else _deal(lines, rng)
        for name, lines in rows.items()
    }


def _deal(lines: Lines, rng: random.Random) -> Lines:
    """Each kind of line has its own label field; a line of scores only informs."""
    if lines and "chosen" in lines[0]:
        return [_exchange(line) if rng.random() < 0.5 else line for line in lines]
    for field in ("label", "score"):
        if lines and field in lines[0]:
            values = [line[field] for line in lines]
            rng.shuffle(values)
            return [line | {field: value} for line, value in zip(lines, values, strict=True)]
    values = [label for line in lines for label in line["labels"]]
    rng.shuffle(values)
    left = iter(values)
    return [line | {"labels": [next(left) for _ in line["labels"]]} for line in lines]


def _exchange(line: dict[str, Any]) -> dict[str, Any]:
    """The two sides of a pair with all that is said of each, such as ``chosen_truncated``."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {
        re.sub("^(chosen|rejected)", lambda side: other[side[0]], field): value
        for field, value in line.items()
    }
