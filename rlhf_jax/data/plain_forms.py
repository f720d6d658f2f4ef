"""The plain forms of what reward models are measured on, and how fields are read into them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.examples import first_field
from rlhf_jax.data.sources import Record
from rlhf_jax.text.chat_template import Message, read_messages

Prompt = str | list[Message]
Reader = Callable[[Record], list[Any]]
NO_ERROR = -1


class Pair(NamedTuple):
    """Two answers to a prompt, the better one first; with a tie the order says nothing.

    `categories` are by kind, such as ``{"domain": "chat", "level": "hard"}``; `models` are the two
    that wrote the answers; `votes` are what each annotator said, in the set's own numbers.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    categories: Mapping[str, str] = {}
    tie: bool = False
    models: tuple[str, str] | None = None
    votes: tuple[int, ...] | None = None


class Samples(NamedTuple):
    """Several completions of a prompt, and which of them are right."""

    prompt: Prompt
    completions: Sequence[str]
    correct: Sequence[bool]
    categories: Mapping[str, str] = {}


class Solution(NamedTuple):
    """A solution in steps.

    `labels` holds 1 for a right step, 0 for a wrong one, None where nobody says: sets that mark the
    first wrong step say nothing of those behind it. Steps count from 0.
    """

    prompt: Prompt
    steps: Sequence[str]
    labels: Sequence[float | None]
    first_wrong: int  # NO_ERROR: no step is wrong
    categories: Mapping[str, str] = {}


def check_item(item: Pair | Samples | Solution) -> None:
    """Raises a ValueError unless the names in an item, of categories and models, are texts."""
    for kind, name in item.categories.items():
        if not isinstance(name, str):
            raise ValueError(f"category {kind} is {name!r}; wanted text")
    for name in (item.models or ()) if isinstance(item, Pair) else ():
        if not isinstance(name, str) or not name:
            raise ValueError(f"models are {item.models!r}; wanted two names")


def read_prompt(record: Record, name: str) -> Prompt:
    """The text or the messages under a field."""
    value = record.get(name)
    if value == "" or value == []:
        raise ValueError(f"field {name!r} is empty; wanted a prompt: text or messages")
    return value if isinstance(value, str) else read_messages(value, name)


def read_conversation(record: Record, name: str) -> tuple[list[Message], str]:
    """What stands before the last answer under a field, and that answer; text is the answer."""
    first_field(record, (name,))
    if isinstance(record[name], str):
        return [], record[name]
    messages = read_messages(record[name], name)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"field {name!r} ends in a message of {messages[-1]['role']!r}")
    return messages[:-1], messages[-1]["content"]


def shared_start(first: list[Message], second: list[Message]) -> list[Message]:
    """The messages before two answers, which must be the same."""
    if first != second or not first:
        raise ValueError("no field prompt, and chosen and rejected do not begin alike")
    return first


def category(record: Record) -> dict[str, str]:
    """The first of the usual fields of a category that the record has."""
    for name in ("category", "subset", "domain"):
        if isinstance(record.get(name), str):
            return {name: record[name]}
    return {}


def read_list(record: Record, name: str) -> list[Any]:
    """The list under a field, which has at least one entry."""
    first_field(record, (name,))
    if not isinstance(record[name], list):
        raise ValueError(f"field {name!r} holds {type(record[name]).__name__}; wanted a list")
    if not record[name]:
        raise ValueError(f"field {name!r} holds an empty list; wanted one entry or more")
    return record[name]


def read_texts(record: Record, name: str) -> list[str]:
    """The list of texts under a field."""
    found = read_list(record, name)
    for one in found:
        if not isinstance(one, str):
            raise ValueError(f"field {name!r} holds {type(one).__name__} where text is wanted")
    return found


def bit(value: Any, name: str) -> bool:
    """True or false, which files also write as 1 and 0."""
    if value not in (0, 1):
        raise ValueError(f"field {name!r} holds {value!r}; wanted true or false")
    return bool(value)


def names_second(record: Record, name: str, *, first: int) -> bool:
    """Whether a label that counts from `first` names the second answer."""
    if record.get(name) not in (first, first + 1):
        raise ValueError(f"{name}={record.get(name)!r}; wanted {first} or {first + 1}")
    return record[name] == first + 1


def two(values: Any, name: str) -> tuple[str, str]:
    """The two texts of a list that stands under a field."""
    listed = isinstance(values, list | tuple) and len(values) == 2
    if not listed or not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {name!r} holds {values!r}; wanted two texts")
    return values[0], values[1]


def turned(both: tuple[str, str], swap: bool) -> tuple[str, str]:
    """Two texts, the other way round if `swap`."""
    return (both[1], both[0]) if swap else both


def both_named(first: str, second: str) -> tuple[str, str] | None:
    """The names of two models, None unless both have one."""
    return (first, second) if first and second else None


def ordered(items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Every two of the items, the earlier one first."""
    for i, one in enumerate(items):
        for other in items[i + 1 :]:
            yield one, other
