"""What a section of a config may hold: known keys, their types, and one line where it differs.

A section is described by a `typing.TypedDict`: its annotations are the keys and their types,
``NotRequired`` ones may be left out. Those of the programs stand in `rlhf_jax.sections`. Where a
section is handed to a factory, the factory's own signature is the description (`check_call`).
"""

import contextlib
import dataclasses
import difflib
import inspect
import pathlib
import re
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NotRequired, Union

# Said of keys at the top of a config, which is where two programs differ.
_OTHER = "; is it a config for another program?"


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The smallest number that a key may hold, as ``Annotated[int, AtLeast(1)]``."""

    least: int


Count = typing.Annotated[int, AtLeast(1)]
Index = typing.Annotated[int, AtLeast(0)]


def check_section(path: str, values: Mapping[str, Any], described: type) -> None:
    """Holds a section, and the sections in it, to its description.

    Args:
        path: where the section stands in the config; empty for the whole config.
        values: plain values, such as ``config.to_dict()``.
        described: a TypedDict.

    Raises:
        ValueError: naming the first key that is unknown, absent or of another type.
    """
    hints = typing.get_type_hints(described, include_extras=True)
    check_keys(path, values, hints, described.__required_keys__)
    for key, value in values.items():
        _check_value(join(path, key), value, hints[key])


def check_keys(
    path: str, given: Collection[str], known: Collection[str], required: Collection[str] = ()
) -> None:
    """Raises a ValueError for the first key that is not known, then for one that is absent."""
    unknown = [key for key in given if key not in known]
    if unknown:
        near = closest(unknown[0], [name for name in known if name not in given])
        listed = ", ".join(sorted(known)) or "none"
        other = _OTHER if not path and len(unknown) > 1 else ""
        raise ValueError(f"{join(path, unknown[0])}: no such key{near}; known: {listed}{other}")
    absent = sorted(set(required) - set(given))
    if absent:
        there = f"{path or 'the config'} has {', '.join(sorted(given)) or 'nothing'}"
        said = f"{join(path, absent[0])} is missing; {there}"
        raise ValueError(said if path else said + _OTHER)


def check_call(
    path: str,
    factory: Callable,
    values: Mapping[str, Any],
    *,
    given: Collection[str] = (),
    also: Collection[str] = (),
) -> None:
    """Holds a section to the signature of the factory that gets it; calls nothing.

    Args:
        given: parameters that are not the section's to set.
        also: keys of the same section that others read, to be named among the known ones.

    Raises:
        ValueError: naming the first key that is unknown, absent or of another type.
    """
    parameters = inspect.signature(factory).parameters.values()
    named = {p.name: p for p in parameters if p.kind != p.VAR_KEYWORD and p.name not in given}
    if all(p.kind != p.VAR_KEYWORD for p in parameters):
        required = [name for name, p in named.items() if p.default is p.empty]
        check_keys(path, values, [*named, *also], required)
    for key, value in values.items():
        if key in named:
            _check_value(join(path, key), value, named[key].annotation)


def join(path: str, key: str) -> str:
    """The path of a key of the section at ``path``."""
    return f"{path}.{key}" if path else key


def closest(key: str, known: Collection[str]) -> str:
    """``; did you mean 'prompts'?``, or nothing where no known key is like ``key``."""
    found = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _check_value(path: str, value: Any, hint: Any) -> None:
    """Holds a value to a type, as far as the type is one that configs use."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is NotRequired:
        _check_value(path, value, parts[0])
    elif typing.is_typeddict(hint):
        _check_mapping(path, value)
        check_section(path, value, hint)
    elif origin is dict:
        _check_mapping(path, value)
        for key, inner in value.items():
            _check_value(join(path, key), inner, parts[1])
    elif hint is Mapping or origin is Mapping:
        _check_mapping(path, value)
    elif origin is typing.Annotated:
        _check_value(path, value, parts[0])
        for limit in parts[1:]:
            if isinstance(limit, AtLeast) and value < limit.least:
                raise ValueError(f"{path}={value!r}; wanted {limit.least} or more")
    elif not _fits(value, hint):
        raise ValueError(f"{path}={value!r} is {_kind(value)}; wanted {_spelt(hint)}")


def _check_mapping(path: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}={value!r} is {_kind(value)}; wanted a section of keys")


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of a plain type; types that no config holds fit everything."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return listed and all(_fits(item, parts[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, types.NoneType):
        return isinstance(value, hint)
    return True


def _kind(value: Any) -> str:
    return "a section" if isinstance(value, Mapping) else type(value).__name__


def _spelt(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


@contextlib.contextmanager
def within(path: str) -> Iterator[None]:
    """Puts ``path`` before what this package says of bad input, where it does not yet begin so."""
    try:
        yield
    except ValueError as error:
        begun = re.match(re.escape(path) + "[.:=]", str(error))
        if begun or not is_ours(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def is_ours(error: BaseException) -> bool:
    """Whether ``error`` was raised in this package, not in a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and in_package(frames[-1])


def in_package(frame: traceback.FrameSummary) -> bool:
    """Whether a frame of a traceback is a line of this package."""
    return pathlib.Path(__file__).parent in pathlib.Path(frame.filename).parents
