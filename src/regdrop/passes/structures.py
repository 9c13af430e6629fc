"""What a batch may be built of: the parts and names of its structures, and how they are rebuilt.

Structures are mappings, tuples, lists, and records: objects whose class lists their fields.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regdrop.passes.containers import is_container, is_graph

# What most leaves of a batch are that are no tensors: nothing is looked for in them.
SIMPLE = (str, bytes, int, float, complex, type(None))
_UNSET = object()


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
    """Return a copy of a record with other values in some of its fields."""
    if is_pydantic(original):
        return original.model_copy(update=dict(changed))
    try:
        result = copy.copy(original)
    except AttributeError:  # slots of attrs that are not set cannot be copied
        result = object.__new__(type(original))
        changed = {**(record_items(original) or {}), **changed}
    for name, item in changed.items():
        # A frozen dataclass is filled the way its own __init__ does it.
        object.__setattr__(result, name, item)
    return result


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


def copy_structure(value: Any, *, clones: bool = False, shared: Iterable[str] = ()) -> Any:
    """Return new structures around the same leaves, and graphs around the same tensors.

    Who adds, changes or takes away items there leaves the original as it is; who changes a tensor
    in place, where they are clones. What is no structure is itself.

    Args:
        value: The structure.
        clones: Whether tensors and arrays are cloned; the gradient goes through.
        shared: Names whose items are themselves, not clones.
    """
    if isinstance(value, (Tensor, PackedSequence)) or is_array(value):
        return _clone(value) if clones else value
    if isinstance(value, SIMPLE):
        return value
    if is_container(value):
        return value.clone() if clones else copy.copy(value)

    def inside(item: Any, name: Any = None) -> Any:
        return copy_structure(item, clones=clones and name not in shared, shared=shared)

    if isinstance(value, Mapping):
        return rebuild_mapping(value, {name: inside(item, name) for name, item in value.items()})
    record = record_items(value)
    if record is not None:
        return rebuild_record(value, {name: inside(item, name) for name, item in record.items()})
    if isinstance(value, (tuple, list)):
        parts = [inside(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _clone(leaf: Any) -> Any:
    if isinstance(leaf, PackedSequence):
        return leaf._replace(data=leaf.data.clone())
    return leaf.clone() if isinstance(leaf, Tensor) else leaf.copy()


def children(value: Any) -> Iterable[Any]:
    """Return what a structure holds, without what its items hold."""
    if isinstance(value, (tuple, list)):
        return value
    return named_children(value).values()


def named_children(value: Any) -> Mapping[Any, Any]:
    """Return what a mapping or a record holds, by its names; nothing for anything else."""
    if isinstance(value, Mapping):
        return value
    return {} if isinstance(value, SIMPLE) else record_items(value) or {}


def find_names(value: Any) -> Iterator[Any]:
    """Yield the names in a structure, at any depth."""
    if isinstance(value, (*SIMPLE, Tensor)) or is_container(value):
        return
    yield from named_children(value).keys()  # a TensorDict iterates over its rows
    for child in children(value):
        yield from find_names(child)


def find_leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors, packed sequences, graphs and arrays in a structure, in order."""
    if isinstance(value, SIMPLE):
        return
    is_builtin = type(value) in (dict, list, tuple)
    if isinstance(value, (Tensor, PackedSequence)) or (
        not is_builtin and (is_graph(value) or is_array(value))
    ):
        yield value
        return
    for child in children(value):
        yield from find_leaves(child)


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
