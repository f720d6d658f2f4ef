"""Mathematical answers: what a completion ends in against the record's answer, on the host.

The final answer stands in the last ``\\boxed{...}`` (MATH; Hendrycks et al., 2021,
https://arxiv.org/abs/2103.03874) or after the last ``####`` (GSM8K; Cobbe et al., 2021,
https://arxiv.org/abs/2110.14168), whichever comes later in the text. Two answers are equal if
they are the same text up to spacing, the same number (compared exactly, as fractions), or, where
one is no plain number, the same mathematics by math-verify
(https://github.com/huggingface/Math-Verify), which runs in processes with limits.
"""

import decimal
import fractions
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.rewards.base import Decode, Records, host_reward
from rlhf_jax.rewards.math_pool import Pool
from rlhf_jax.types import Reward

FALLBACKS = ("phrase", "number")
LONGEST = 1000  # characters of an answer; the longest of MATH's 12,500 has 139

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_PHRASE = re.compile(r"answer\s+is\s*:?\s*([^\n]*)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)")
_NUMBER = re.compile(r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?")
# What changes how an answer looks and not what it says; MATH leaves degrees out of its answers.
_LOOKS = re.compile(
    r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,!;:$]|\\(?=[%#&])|[$]|\.+$"
    r"|\^(?:\\circ(?![A-Za-z])|\{\\circ\})"
)
_SPACES = re.compile(r"(?:\\?\s|~)+")
# All but those between two numbers: "1 1/2" is not 11/2, and "7 8" not 78.
_LOOSE_SPACE = re.compile(r"(?<![0-9.]) | (?![0-9.])")
_NUMBERS_APART = re.compile(r"[0-9.] [0-9.]")
_FRACTION = re.compile(r"(-?)\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))")
_PLAIN = re.compile(r"([-+]?)(\d+(?:\.\d*)?|\.\d+)(?:/(\d+))?", re.ASCII)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?", re.ASCII)
_MIXED = re.compile(r"([-+]?)(\d+) (\d+)/(\d+)", re.ASCII)


def final_answer(text: str, *, marker: str = "####", fallbacks: Sequence[str] = ()) -> str | None:
    """The last answer that `text` marks by ``\\boxed`` or `marker`; None if there is none.

    A box that is not closed is no answer, and the one before it does not count in its place.

    Args:
        marker: what stands before an answer, on the same line.
        fallbacks: what to look for in a text without a mark, in this order: "phrase", what
            follows the last "the answer is"; "number", the last number.

    >>> final_answer("so \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    >>> final_answer("#### 1,234")
    '1,234'
    """
    boxes = [found.end() for found in _BOX.finditer(text)]
    box, mark = boxes[-1] if boxes else -1, text.rfind(marker)
    if box > mark:
        found = _in_box(text[box : box + 4 * LONGEST])
        return found.strip() or None if found is not None else None
    if mark >= 0:
        return text[mark + len(marker) :].partition("\n")[0].strip() or None
    for fallback in fallbacks:
        if fallback == "phrase":
            said = _PHRASE.findall(text)
            found = [_SENTENCE_END.split(said[-1].strip())[0].strip("*` ")] if said else []
        else:
            found = _NUMBER.findall(text)
        if found and found[-1]:
            return found[-1]
    return None


def _in_box(rest: str) -> str | None:
    """What stands between the brace that `rest` begins with and its partner.

    Without a brace the box holds one word, as in ``$\\boxed 9$``.
    """
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0] or None
    depth, at = 0, 0
    while at < len(rest):
        if rest[at] == "\\":
            at += 1  # \{ and \} are letters of a set, not braces
        elif rest[at] == "{":
            depth += 1
        elif rest[at] == "}":
            depth -= 1
            if depth == 0:
                return rest[1:at]
        at += 1
    return None


def plain(answer: str) -> str:
    """The answer without what is only looks: dollar signs, \\left, a closing dot, spaces but one
    between two numbers.

    >>> plain("\\\\left( \\\\dfrac{1}{2}, 3 \\\\right)")
    '(\\\\frac{1}{2},3)'
    """
    answer = _LOOKS.sub("", _SPACES.sub(" ", answer).strip()).replace("{,}", ",")
    answer = _LOOSE_SPACE.sub("", answer)
    return re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", answer)


def number(answer: str) -> fractions.Fraction | None:
    """The exact value of a plain number or fraction, such as 1,234.50, 3/4 or 1 1/2; None for
    others.

    A percent sign is a unit here, as in MATH's answers: 50% is 50.
    """
    answer = plain(answer).removesuffix("%")
    if _THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "").replace(" ", "")
    mixed = _MIXED.fullmatch(answer)
    if mixed:
        sign, whole, top, below = mixed.groups()
        answer = f"{sign}{int(whole) * int(below) + int(top)}/{below}"
    found = _FRACTION.fullmatch(answer)
    if found:
        sign, *parts = found.groups()
        top, below = (part for part in parts if part)
        answer = f"{sign}{top}/{below}"
    found = _PLAIN.fullmatch(answer)
    if not found:
        return None
    sign, digits, below = found.groups()
    if below is not None and not int(below):
        return None
    # Through a decimal: an answer has at most LONGEST digits, and none of them an exponent.
    value = fractions.Fraction(decimal.Decimal(digits)) / int(below or 1)
    return -value if sign == "-" else value


def reference_answer(value: Any, *, marker: str = "####") -> str:
    """A record's answer as text: a number, an answer, or a solution that marks its answer.

    Raises:
        ValueError: there is no answer in it.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the answer is {value!r}; wanted a text or a number")
    if isinstance(value, float):
        value = format(decimal.Decimal(repr(value)), "f")
    text = str(value)
    marked = marker in text or _BOX.search(text)
    found = final_answer(text, marker=marker) if marked else text.strip()
    if not found or not _readable(found) or not plain(found):
        raise ValueError(
            f"no answer of at most {LONGEST} characters in the record's {text[-80:]!r}; wanted a "
            "number, an answer, or a solution that ends in \\boxed{{...}} or {marker} ..."
        )
    return found


def _readable(answer: str) -> bool:
    if len(answer) > LONGEST:
        return False
    return not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in answer)


def equal_answers(reference: str, answer: str, pool: Pool) -> bool:
    """Whether `answer` equals `reference`: as text, as numbers, or as mathematics."""
    if not _readable(answer):
        return False
    if plain(reference) == plain(answer):
        return True
    numbers = number(reference), number(answer)
    if None not in numbers and (numbers[0] == numbers[1] or "%" not in reference + answer):
        return numbers[0] == numbers[1]
    apart = [bool(_NUMBERS_APART.search(plain(text))) for text in (reference, answer)]
    if apart[0] != apart[1] and None in numbers and numbers != (None, None):
        return False  # one number is not two
    tidy = [" ".join(text.split()).rstrip(". ") for text in (reference, answer)]
    return pool.equal(*tidy)


def math_answer(
    *,
    decode: Decode,
    records: Records,
    answer: str = "answer",
    marker: str = "####",
    fallbacks: tuple[str, ...] = (),
    cpu_seconds: int = 5,
    timeout: float | int = 600.0,
    on_error: float | int | None = None,
    workers: int = 2,
) -> Reward:
    r"""1 if the completion's final answer is the record's, else 0.

    A completion without an answer scores 0, and so does one whose answer costs more than is
    allowed (9^(9^9)), is not closed, is too long, or holds control characters. A record whose
    answer cannot be read is an error: the data is wrong.

    Args:
        decode: token ids -> text.
        records: (source, record) -> fields of the record.
        answer: the field that holds the answer: a number, an answer, or a whole solution.
        marker: what stands before an answer, besides \boxed.
        fallbacks: see `final_answer`; with none, an answer must be marked.
        cpu_seconds: of CPU time for one comparison that needs symbols.
        timeout, on_error, workers: see `host_reward`. The first calls start processes, which
            import sympy for some seconds.

    Example:
        >>> reward = math_answer(decode=decode, records=records, answer="solution")
    """
    unknown = sorted(set(fallbacks) - set(FALLBACKS))
    if unknown:
        raise ValueError(f"math_answer: fallbacks={fallbacks}; known: {FALLBACKS}")
    if not marker:
        raise ValueError("math_answer: marker is empty")
    if cpu_seconds < 1:
        raise ValueError(f"math_answer: cpu_seconds={cpu_seconds}, wanted 1 or more")
    pool = Pool(cpu_seconds)

    def score(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        reference = reference_answer(record[answer], marker=marker)
        given = final_answer(completion, marker=marker, fallbacks=fallbacks)
        return float(given is not None and equal_answers(reference, given, pool))

    return host_reward(
        "math_answer",
        score,
        decode=decode,
        records=records,
        timeout=timeout,
        on_error=on_error,
        workers=workers,
    )
