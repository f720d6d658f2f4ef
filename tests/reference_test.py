"""docs/reference.md names every key of the schema, every program, and the flags of the others."""

import inspect
import pathlib
import re
import typing
from collections.abc import Iterator

import pytest

from rlhf_jax import card, export, generate, label_confidence, score, sections

FLAGS = (
    *(card.card, export.export, generate.generate, label_confidence.label_confidence),
    score.score,
)
TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "reference.md").read_text(encoding="utf-8")


def keys(described: type) -> Iterator[str]:
    """Every key of a section and of the sections in it."""
    for name, kind in typing.get_type_hints(described).items():
        yield name
        for part in (kind, *typing.get_args(kind)):
            if typing.is_typeddict(part):
                yield from keys(part)


@pytest.mark.parametrize("program", sections.PROGRAMS)
def test_every_key_is_in_the_reference(program):
    words = set(re.findall(r"\w+", TEXT))
    assert program in words
    assert set(keys(sections.PROGRAMS[program])) <= words


@pytest.mark.parametrize("main", FLAGS)
def test_every_flag_is_in_the_reference(main):
    words = set(re.findall(r"\w+", TEXT))
    assert main.__name__ in words
    assert set(inspect.signature(main).parameters) <= words
