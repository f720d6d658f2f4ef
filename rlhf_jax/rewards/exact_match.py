"""Exact answers: the number after ``####`` against the record's, on the host.

The answer form is that of GSM8K (Cobbe et al., 2021, https://arxiv.org/abs/2110.14168): a worked
solution whose last line is ``#### 1,234``. Numbers are compared exactly (as decimals), so 90 and
90.0 are equal and 0.1 + 0.2 has no say.
"""

import decimal
import re
from collections.abc import Mapping
from typing import Any

from rlhf_jax.rewards.base import Decode, Records, host_reward
from rlhf_jax.types import Reward

# A number on its own: "90", "-3.50", ".5", with a closing dot or not; not the 1 of "1/2".
_NUMBER = re.compile(r"\s*([-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))\.?(?=\s|$)")


def parse_number(text: str) -> decimal.Decimal | None:
    """The number that `text` begins with; commas and dollar signs are left out.

    >>> parse_number(" $1,234.")
    Decimal('1234')
    """
    found = _NUMBER.match(text.replace(",", "").replace("$", ""))
    return decimal.Decimal(found.group(1)) if found else None


def parse_answer(text: str, marker: str) -> decimal.Decimal | None:
    """The number after the last `marker`, on the same line; None if there is none."""
    _, found, rest = text.rpartition(marker)
    return parse_number(rest.partition("\n")[0]) if found else None


def is_exact(completion: str, answer: str, marker: str = "####") -> bool:
    """Whether the completion's number after the last `marker` is that of `answer`.

    Args:
        answer: a number, or a solution with the number behind `marker`.

    Raises:
        ValueError: `answer` holds no number.
    """
    wanted = parse_answer(answer, marker) if marker in answer else parse_number(answer)
    if wanted is None:
        raise ValueError(f"the answer holds no number: {answer[-80:]!r}")
    return parse_answer(completion, marker) == wanted


def exact_match(
    *,
    decode: Decode,
    records: Records,
    answer: str = "answer",
    marker: str = "####",
    timeout: float | int = 10.0,
    on_error: float | int | None = None,
    workers: int = 2,
) -> Reward:
    """1 if the completion's number after the last `marker` is the record's, else 0.

    A completion without an answer scores 0. A record without one is an error: the data is wrong.

    Args:
        decode: token ids -> text.
        records: (source, record) -> fields of the record.
        answer: the field that holds the answer: a number, or a solution that ends in one.
        marker: what stands before the number.
        timeout, on_error, workers: see `host_reward`.
    """
    if not marker:
        raise ValueError("exact_match: marker is empty")

    def score(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        return float(is_exact(completion, str(record[answer]), marker))

    return host_reward(
        "exact_match",
        score,
        decode=decode,
        records=records,
        timeout=timeout,
        on_error=on_error,
        workers=workers,
    )
