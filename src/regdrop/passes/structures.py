"""What a batch may be built of: the parts and names of its structures, and how they are rebuilt.

Structures are mappings, tuples, lists, and records: objects whose class lists their fields.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regdrop.passes.containers import is_container, is_graph

# What most leaves of a batch are that are no tensors: nothing is looked for in them.
SIMPLE = (str, bytes, int, float, complex, type(None))
_PLAIN = frozenset((*SIMPLE, bool))
_UNSET = object()


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text or None, or a list or tuple of them alone.

    Batches hold long lists of tokens, of which nothing but the types is looked at.
    """
    if isinstance(value, SIMPLE):
        return True
    return type(value) in (list, tuple) and _PLAIN.issuperset(map(type, value))


def record_items(value: Any) -> dict[str, Any] | None:
    """Return the fields of a dataclass, a class of attrs or pydantic, or a `SimpleNamespace`.

    Those that are not set are left out. None for anything else.
    """
    if isinstance(value, type):
        return None
    if is_dataclass(value):
        names = [field.name for field in fields(value)]
    elif isinstance(value, SimpleNamespace):
        return dict(vars(value))
    elif hasattr(type(value), "__attrs_attrs__"):
        names = [attribute.name for attribute in type(value).__attrs_attrs__]
    elif is_pydantic(value):
        names = [*type(value).model_fields, *(value.__pydantic_extra__ or {})]
    else:
        return None
    items = {name: getattr(value, name, _UNSET) for name in names}
    return {name: item for name, item in items.items() if item is not _UNSET}


def rebuild_record(original: Any, changed: Mapping[str, Any]) -> Any:
    """Return a copy of a record with other values in some of its fields.

    What a `cached_property` keeps is left out: it is that of the original's fields.
    """
    if is_pydantic(original):
        result = original.model_copy(update=dict(changed))
    else:
        try:
            result = copy.copy(original)
        except AttributeError:  # slots of attrs that are not set cannot be copied
            result = object.__new__(type(original))
            changed = {**(record_items(original) or {}), **changed}
        for name, item in changed.items():
            # A frozen dataclass is filled the way its own __init__ does it.
            object.__setattr__(result, name, item)
    for name in cached_names(result):
        if name not in changed:
            object.__delattr__(result, name)
    return result


def cached_names(value: Any) -> list[str]:
    """Return the names of what an object's properties have computed once and keep."""
    own = getattr(value, "__dict__", {})
    return [name for name in own if isinstance(getattr(type(value), name, None), cached_property)]


def rebuild_mapping(original: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    """Return a copy of a mapping, of its own type, with other values under all of its names."""
    if type(original) is dict:
        return changed
    if not isinstance(original, MutableMapping):
        constructor: Callable[[Any], Any] = type(original)
        return constructor(changed)
    result = copy.copy(original)
    if not isinstance(original, dict):
        # UserDict, BatchEncoding and their like keep their items in an attribute, which copy()
        # shares.
        for name, store in list(getattr(result, "__dict__", {}).items()):
            if isinstance(store, dict):
                object.__setattr__(result, name, copy.copy(store))
    for name, item in changed.items():
        result[name] = item
    return result


def rebuild_sequence(original: Sequence[Any], items: Iterable[Any]) -> Any:
    """Return a list or a tuple, of the same type as the original, of other items."""
    if hasattr(original, "_make"):  # a namedtuple
        return original._make(items)
    if isinstance(original, list) and type(original) is not list:
        result = copy.copy(original)  # its constructor may take anything
        result[:] = items
        return result
    constructor: Callable[[Any], Any] = type(original)
    return constructor(items)


def items_by_name(value: Any) -> dict[Any, Any] | None:
    """Return what a structure holds, by names, or by places in a list or a tuple.

    None for what is no structure.
    """
    if isinstance(value, Mapping):
        return dict(value.items())  # a TensorDict iterates over its rows
    if isinstance(value, (tuple, list)):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    return None if isinstance(value, SIMPLE) else record_items(value)


def map_items(function: Callable[[Any, Any], Any], value: Any) -> Any:
    """Return a structure of the same type around what becomes of the items of a structure.

    Args:
        function: From the name or place of an item, as in `items_by_name`, and the item to what
            stands there in the new structure.
        value: The structure; what is none is itself.
    """
    items = items_by_name(value)
    if items is None:
        return value
    changed = {name: function(name, item) for name, item in items.items()}
    if isinstance(value, Mapping):
        return rebuild_mapping(value, changed)
    if isinstance(value, (tuple, list)):
        return rebuild_sequence(value, changed.values())
    return rebuild_record(value, changed)


def copy_structure(value: Any, *, clones: bool = False, shared: Iterable[str] = ()) -> Any:
    """Return new structures around the same leaves, and graphs around the same tensors.

    Who adds, changes or takes away items there leaves the original as it is; who changes a tensor
    in place, where they are clones. What is no structure is itself.

    Args:
        value: The structure.
        clones: Whether tensors and arrays are cloned; the gradient goes through.
        shared: Names whose items are themselves, not clones.
    """
    if is_plain(value):
        return list(value) if type(value) is list else value
    if isinstance(value, (Tensor, PackedSequence)) or is_array(value):
        return _clone(value) if clones else value
    if is_container(value):
        return value.clone() if clones else copy.copy(value)

    def inside(name: Any, item: Any) -> Any:
        return copy_structure(item, clones=clones and name not in shared, shared=shared)

    return map_items(inside, value)


def _clone(leaf: Any) -> Any:
    if isinstance(leaf, PackedSequence):
        return leaf._replace(data=leaf.data.clone())
    return leaf.clone() if isinstance(leaf, Tensor) else leaf.copy()


def children(value: Any) -> Iterable[Any]:
    """Return what a structure holds, without what its items hold."""
    if isinstance(value, (tuple, list)):
        return value
    return (items_by_name(value) or {}).values()


def named_children(value: Any) -> dict[Any, Any]:
    """Return what a mapping, a record or a namedtuple holds, by its names; nothing else's."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return {}
    return {} if isinstance(value, PackedSequence) else items_by_name(value) or {}


def find_names(value: Any) -> Iterator[Any]:
    """Yield the names in a structure, at any depth."""
    if is_plain(value) or isinstance(value, (Tensor, PackedSequence)) or is_container(value):
        return
    yield from named_children(value).keys()  # a TensorDict iterates over its rows
    for child in children(value):
        yield from find_names(child)


def find_leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors, packed sequences, graphs and arrays in a structure, in order."""
    for _, leaf in find_named_leaves(value):
        yield leaf


def find_named_leaves(
    value: Any, names: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield what `find_leaves` does, behind the names that lead to it, the outermost first."""
    if is_plain(value):
        return
    is_builtin = type(value) in (dict, list, tuple)
    if isinstance(value, (Tensor, PackedSequence)) or (
        not is_builtin and (is_graph(value) or is_array(value))
    ):
        yield names, value
        return
    named = named_children(value)
    if not named:
        for child in children(value):
            yield from find_named_leaves(child, names)
    for name, child in named.items():
        yield from find_named_leaves(child, (*names, name))


def is_array(value: Any) -> bool:
    """Return whether a value is an array of NumPy, which only then is loaded."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def as_names(shared: Any) -> tuple[str, ...]:
    """Return the names in `shared`, one or several.

    Raises:
        TypeError: If it is neither a name nor several.
    """
    if isinstance(shared, str):
        return (shared,)
    names = tuple(shared) if isinstance(shared, Iterable) else (shared,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"shared must be a name or several, got a {type(name).__name__}")
    return names


def is_pydantic(value: Any) -> bool:
    """Return whether a value is a model of pydantic, 2 or newer."""
    return hasattr(type(value), "model_fields") and hasattr(value, "__pydantic_extra__")
