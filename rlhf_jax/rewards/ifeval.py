"""Instructions that a program can check: which of a record's a completion follows.

IFEval (Zhou et al., 2023, https://arxiv.org/abs/2311.07911). A record names its instructions in
``instruction_id_list`` and gives the arguments of each in ``kwargs``. Strict reads the response
as it is; loose (section 2.2) follows if one of eight forms of it does: without its first line, its
last, or both ("Sure, here it is:"), and each of these without stars (Markdown's emphasis).
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.rewards.base import Decode, Records, host_reward
from rlhf_jax.rewards.ifeval_checks import CHECKS
from rlhf_jax.types import Reward

SCORES = ("all", "share")
READINGS = ("strict", "loose")


def follows(text: str, instruction: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `text` follows one instruction; a blank one follows none.

    Args:
        arguments: of the instruction; those that are None count as absent.

    Raises:
        ValueError: the instruction is unknown, or the arguments are not its own.

    >>> follows("No commas here.", "punctuation:no_comma", {})
    True
    """
    check = CHECKS.get(instruction)
    if check is None:
        raise ValueError(f"instruction {instruction!r} is unknown; known: {', '.join(CHECKS)}")
    given = {name: value for name, value in arguments.items() if value is not None}
    wanted = set(inspect.signature(check).parameters) - {"text"}
    if set(given) != wanted:
        raise ValueError(
            f"instruction {instruction!r} has arguments {sorted(given)}; wanted {sorted(wanted)}"
        )
    return bool(text.strip()) and check(text, **given)


def readings(text: str) -> tuple[str, ...]:
    """The eight forms of a response that the loose reading looks at."""
    lines = text.split("\n")
    cuts = ("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))
    forms = (text, *cuts)
    return (*forms, *(form.replace("*", "") for form in forms))


def followed(
    text: str, instructions: Sequence[str], arguments: Sequence[Mapping[str, Any]], *, reading: str
) -> list[bool]:
    """Which of the instructions `text` follows."""
    if len(instructions) != len(arguments) or not instructions:
        raise ValueError(
            f"instruction_id_list has {len(instructions)} entries and kwargs {len(arguments)}; "
            "wanted as many, and one at least"
        )
    forms = readings(text) if reading == "loose" else (text,)
    return [
        any(follows(form, instruction, given) for form in forms)
        for instruction, given in zip(instructions, arguments, strict=True)
    ]


def ifeval(
    *,
    decode: Decode,
    records: Records,
    score: str = "all",
    reading: str = "strict",
    timeout: float | int = 30.0,
    on_error: float | int | None = None,
    workers: int = 2,
) -> Reward:
    """1 if the completion follows all of the record's instructions, else 0; or the share.

    Args:
        decode: token ids -> text.
        records: (source, record) -> a record with `instruction_id_list` and `kwargs`.
        score: "all", or "share" of the instructions.
        reading: "strict", or "loose".
        timeout, on_error, workers: see `host_reward`.

    Example:
        >>> reward = ifeval(decode=decode, records=records, score="share")
    """
    if score not in SCORES:
        raise ValueError(f"ifeval: score={score!r}; known: {SCORES}")
    if reading not in READINGS:
        raise ValueError(f"ifeval: reading={reading!r}; known: {READINGS}")

    def judge(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        met = followed(completion, record["instruction_id_list"], record["kwargs"], reading=reading)
        return sum(met) / len(met) if score == "share" else float(all(met))

    return host_reward(
        "ifeval",
        judge,
        decode=decode,
        records=records,
        timeout=timeout,
        on_error=on_error,
        workers=workers,
    )
