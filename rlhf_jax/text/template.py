"""From the fields of a record to the text of a prompt, and from dialogues to prompt and reply."""

import itertools
import string
from collections.abc import Mapping
from typing import Any

ASSISTANT = "\n\nAssistant:"


def render(template: str, record: Mapping[str, Any]) -> str:
    """`template` with the fields of `record` put in, in the form of ``str.format``.

    Special tokens are written by name (``"<s>{question}\\n"``), as tokenizers know them in text.

    Raises:
        ValueError: the template names a field that the record lacks or that holds no text (a
            list of messages, say, which Python would write out with its brackets), or is
            malformed; or the record has no fields.

    Example:
        >>> render("Question: {question}\\n", {"question": "37 +8"})
        'Question: 37 +8\\n'
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"the record is a {type(record).__name__}; wanted named fields")
    try:
        written = _written_fields(template, record)
        text = template.format_map(record)
    except KeyError as error:
        raise ValueError(
            f"template {template!r} names field {error}, the record has {', '.join(record)}"
        ) from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"template {template!r}: {error}; write {{{{ for a brace") from error
    for name, value in written:
        if not isinstance(value, str | int | float):
            kind = type(value).__name__
            raise ValueError(
                f"template {template!r}: field {name!r} holds {kind} where text is wanted"
                + (f"; for messages set chat={name!r}" if isinstance(value, list) else "")
            )
    return text


def _written_fields(template: str, record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of the fields that are written as they are; "!r" asks for Python's form."""
    formatter = string.Formatter()
    return [
        (name, formatter.get_field(name, (), record)[0])
        for _, name, _, conversion in formatter.parse(template)
        if name and conversion is None
    ]


def split_dialogue(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two dialogues that differ in the last reply, as (prompt, chosen reply, rejected reply).

    The form of HH-RLHF (Bai et al., 2022, https://arxiv.org/abs/2204.05862): turns begin with
    ``"\\n\\nHuman:"`` and ``"\\n\\nAssistant:"``. The prompt is what both share through the last
    common ``"\\n\\nAssistant:"``; nothing is stripped.

    Raises:
        ValueError: the two have no assistant turn in common.
    """
    pairs = zip(chosen, rejected, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    at = chosen[:same].rfind(ASSISTANT)
    if at < 0:
        raise ValueError(f"no common {ASSISTANT!r} in {chosen[:60]!r} and {rejected[:60]!r}")
    cut = at + len(ASSISTANT)
    return chosen[:cut], chosen[cut:], rejected[cut:]
