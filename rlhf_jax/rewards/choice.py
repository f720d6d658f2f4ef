r"""Letters of multiple choice: the one that a completion settles on against the record's.

The letter stands in the last ``\boxed{C}``, or in the last phrase that says what the answer is
("The answer is (C)", "Answer: C", "option C is correct"). A letter that only stands somewhere is
no answer, unless the config says so: chains of thought name all of the options on their way.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.rewards.base import Decode, Records, host_reward
from rlhf_jax.rewards.math_answer import final_answer
from rlhf_jax.types import Reward

LETTERS = string.ascii_uppercase[:10]  # A to J; MMLU-Pro has ten options
FALLBACKS = ("alone", "brackets")

# What may stand around a letter: brackets, quotes, emphasis, LaTeX's \text{...}.
_BEFORE = r"[\s*_\"'`$(\[{\\]{0,20}(?:\\(?:text|textbf|mathrm|mathbf)\s?\{[\s*($\[]{0,9})?"
# Once, or repeated as some benchmarks ask for (CCCCC). An I before a verb is no option: "I think".
_LETTER = r"(?P<{0}>[A-J])(?P={0}){{0,9}}(?![A-Za-z0-9'’])(?!(?<=I)\s[a-z])"
_AFTER = r"[\s*_\"'`$)\]}.:,\\]{0,20}"
_SUBJECT = (
    r"\b(?:answer|choice|option|solution|guess)(?:\s(?:to|from|among|for|of)\s[^.\n]{0,60}?)?"
)
_VERB = (
    r"(?:\s(?:is|was|(?:should|must|would|could|can|will|appears\sto|seems\sto)\sbe)"
    r"(?:\s(?:likely|probably|clearly|therefore|thus|then|indeed|the|that|as|best|closest))*"
    r"\s?:?|\W{0,3}[:=])"
)
_OPTION = r"(?:\s{0,3}(?:choice|option|letter)(?=[^a-z])(?:\\?_)?)?"
# Only the words may be in capitals or not: "the answer is a matter of taste" names no letter.
_SAID = re.compile(
    rf"(?i:{_SUBJECT}{_VERB}{_OPTION}){_BEFORE}{_LETTER.format('said')}"
    rf"|(?<![A-Za-z0-9]){_LETTER.format('named')}[*)\]]{{0,4}}"
    r"(?i:\s(?:is|must\sbe|would\sbe)\s(?:the\s)?(?:correct|right|best)\b)"
)
_ALONE = re.compile(rf"^{_BEFORE}{_LETTER.format('said')}{_AFTER}$", re.MULTILINE)
_BRACKETS = re.compile(r"\((?P<said>[A-J])\)")
# "I would say C" and "a matter of taste" begin with words, not with letters.
_MARKED = re.compile(
    rf"{_BEFORE}([A-Ja-j])(?![A-Za-z0-9'’])(?!(?<=[AIai])\s+[A-Za-z]).*", re.DOTALL
)
_PLAIN = re.compile(r"\s*\(?([A-Ja-j])[).]?\s*")


def chosen_letter(text: str, fallbacks: Sequence[str] = ()) -> str | None:
    r"""The letter, A to J, that `text` settles on; None if it names none.

    What is marked (``\boxed``, ``####``) counts before what is said; of each the last.

    Args:
        fallbacks: what to look for in a text without either, in this order: "alone", the last
            line that is a letter and nothing else; "brackets", the last letter in round ones.

    >>> chosen_letter("Not (A). The answer is (C).")
    'C'
    """
    marked = _MARKED.fullmatch(final_answer(text) or "")
    if marked:
        return marked.group(1).upper()
    patterns = {"alone": _ALONE, "brackets": _BRACKETS}
    for pattern in [_SAID, *(patterns[name] for name in fallbacks)]:
        found = list(pattern.finditer(text))
        if found:
            return found[-1].group(found[-1].lastgroup)
    return None


def reference_letter(value: Any, choices: Sequence[str] | None = None, *, first: int = 0) -> str:
    """A record's answer as a letter.

    Args:
        value: an index, the text of one of `choices`, or a letter such as C, (C) or c.
        choices: the options in the order of their letters.
        first: the index of A.

    Raises:
        ValueError: it is none of these, or beyond the options.

    >>> reference_letter("Paris", ["Rome", "Paris"])
    'B'
    """
    count = len(LETTERS) if choices is None else len(choices)
    at = None
    if isinstance(value, int) and not isinstance(value, bool):
        at = value - first
    elif isinstance(value, str):
        texts = [] if choices is None else [choice.strip() for choice in choices]
        if texts.count(value.strip()) == 1:
            at = texts.index(value.strip())
        elif found := _PLAIN.fullmatch(value):
            at = LETTERS.index(found.group(1).upper())
    if at is None or not 0 <= at < min(count, len(LETTERS)):
        known = "" if choices is None else f" or one text of {list(choices)}"
        raise ValueError(
            f"the answer is {value!r}; wanted a letter A to {LETTERS[min(count, 10) - 1]}, an "
            f"index from {first}{known}"
        )
    return LETTERS[at]


def choice(
    *,
    decode: Decode,
    records: Records,
    answer: str = "answer",
    choices: str = "",
    first: int = 0,
    fallbacks: tuple[str, ...] = (),
    timeout: float | int = 10.0,
    on_error: float | int | None = None,
    workers: int = 2,
) -> Reward:
    """1 if the completion settles on the record's letter, else 0.

    Args:
        decode: token ids -> text.
        records: (source, record) -> fields of the record.
        answer: the field that holds the answer: a letter, an index, or the text of an option.
        choices: the field that holds the options' texts, if the answer is one; "" for none.
        first: the index of A, where the answer is an index.
        fallbacks: see `chosen_letter`; with none, the answer must be marked or said.
        timeout, on_error, workers: see `host_reward`.

    Example:
        >>> reward = choice(decode=decode, records=records, answer="target")
    """
    unknown = sorted(set(fallbacks) - set(FALLBACKS))
    if unknown:
        raise ValueError(f"choice: fallbacks={fallbacks}; known: {FALLBACKS}")

    def score(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        options = record[choices] if choices else None
        wanted = reference_letter(record[answer], options, first=first)
        return float(chosen_letter(completion, fallbacks) == wanted)

    return host_reward(
        "choice",
        score,
        decode=decode,
        records=records,
        timeout=timeout,
        on_error=on_error,
        workers=workers,
    )
