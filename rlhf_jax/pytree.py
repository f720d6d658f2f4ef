"""The one decorator for data: a frozen keyword-only dataclass that JAX knows as a pytree.

Why not ``flax.struct.dataclass`` or ``jax.tree_util.register_dataclass``: their unflatten calls
``__init__``, and with shape checks on, ``__init__`` rejects the placeholders, shardings and
per-example slices that ``tree.map``, ``vmap`` and ``scan`` put into the fields. Ours builds the
object around ``__init__`` and still checks shapes whenever a person constructs one.
"""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**kwargs):
    """A field that is part of the tree's structure (hashable), not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """Makes ``cls`` a frozen keyword-only dataclass and registers it as a pytree.

    Fields made with `static` go into the tree structure; all others are children, named in key
    paths by their field name.

    Example:
        >>> @pytree
        ... class Pair:
        ...     left: jax.Array
        ...     right: jax.Array
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)
    names = tuple(f.name for f in fields if not f.metadata.get("static"))
    static_names = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten(node):
        return tuple(vars(node)[n] for n in names), tuple(vars(node)[n] for n in static_names)

    def flatten_with_keys(node):
        children, aux = flatten(node)
        keys = (jax.tree_util.GetAttrKey(n) for n in names)
        return tuple(zip(keys, children, strict=True)), aux

    def unflatten(aux, children):
        node = object.__new__(cls)
        for name, value in zip(names + static_names, (*children, *aux), strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
