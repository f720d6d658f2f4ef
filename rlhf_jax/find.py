"""From a name in a config to the factory it means: by importing, without a registry.

A member of a shelf is a module that defines a function of its own name:
``rlhf_jax/algorithms/ppo.py`` with ``def ppo(...)``. Nothing is registered, so nothing depends
on what was imported before, and adding a member is adding a file.
"""

import importlib
import pkgutil
from collections.abc import Callable

SHELVES = ("algorithms", "rewards", "models")


def find(shelf: str, name: str) -> Callable:
    """Returns the factory `name` of a shelf.

    Args:
        shelf: "algorithms", "rewards" or "models".
        name: a member's name, or a dotted path ``my_pkg.bar`` outside of this package: the
            function ``bar`` of the module ``my_pkg.bar``.

    Raises:
        ValueError: no such member; the message lists the known ones.

    Example:
        >>> make = find("algorithms", "ppo")
        >>> algorithm = make(kl_coef=0.05)
    """
    path = name if "." in name else f"{_package(shelf)}.{name}"
    factory = _factory(path)
    if factory is None:
        raise ValueError(
            f"{name!r} is not on the shelf {shelf!r} (looked for a function "
            f"{path.rpartition('.')[2]!r} in a module {path!r}); known: "
            f"{', '.join(members(shelf)) or 'none'}; or give a dotted path like 'my_pkg.bar'"
        )
    return factory


def members(shelf: str) -> list[str]:
    """The names that `find` knows on a shelf, sorted: modules that define their own name."""
    package = importlib.import_module(_package(shelf))
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if _factory(f"{package.__name__}.{name}") is not None]


def _package(shelf):
    if shelf not in SHELVES:
        raise ValueError(f"unknown shelf {shelf!r}; known: {', '.join(SHELVES)}")
    return f"rlhf_jax.{shelf}"


def _factory(path):
    """The function of the module's own name, or None. A module that fails to import what *it*
    needs is not "unknown": that error passes through."""
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        return None
    factory = vars(module).get(path.rpartition(".")[2])
    return factory if callable(factory) else None
