"""What a batch may be built of: the parts and names of its structures, and how they are rebuilt.

Structures are mappings, tuples, lists, and records: objects whose class lists their fields.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from regdrop.passes.containers import count_graphs, is_container, is_graph

# What cannot hold tensors, and what may hold them without being part of a batch.
_NO_PARTS = (str, bytes, int, float, complex, type(None))
_NO_BATCH = (Tensor, PackedSequence, nn.Module, type, FunctionType, ModuleType)
# How deep tensors are looked for in an object: a cache of keys holds layers, which hold tensors.
_DEPTH = 4


def record_items(value: Any) -> dict[str, Any] | None:
    """Return the fields of a dataclass, of a class of attrs or pydantic, or of a namespace.

    None for anything else.
    """
    if isinstance(value, type):
        return None
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, SimpleNamespace):
        return dict(vars(value))
    attributes = getattr(type(value), "__attrs_attrs__", None)
    if attributes is not None:
        return {attribute.name: getattr(value, attribute.name) for attribute in attributes}
    if _is_pydantic(value):
        return {**vars(value), **(value.__pydantic_extra__ or {})}
    return None


def rebuild_record(original: Any, changed: Mapping[str, Any]) -> Any:
    """Return a copy of a record with other values in some of its fields."""
    if _is_pydantic(original):
        return original.model_copy(update=dict(changed))
    result = copy.copy(original)
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


def children(value: Any) -> Iterable[Any]:
    """Return what a structure holds, without what its items hold."""
    if isinstance(value, (tuple, list)):
        return value
    return named_children(value).values()


def named_children(value: Any) -> Mapping[Any, Any]:
    """Return what a mapping or a record holds, by its names; nothing for anything else."""
    if isinstance(value, Mapping):
        return value
    return record_items(value) or {}


def find_names(value: Any) -> Iterator[Any]:
    """Yield the names in a structure, at any depth."""
    yield from named_children(value).keys()  # a TensorDict iterates over its rows
    for child in children(value):
        yield from find_names(child)


def refuse_unseen_items(value: Any, size: int, dim: int, shared: Iterable[str]) -> None:
    """Raise where items of a batch would not be seen: in an object, or one by one in a list.

    Args:
        value: The batch.
        size: Number of items.
        dim: Their dimension in tensors.
        shared: Names that pass through, whatever they hold.

    Raises:
        TypeError: For an object that is no structure and holds tensors of the items, and for a list
            of tensors of different sizes or of single graphs, which are items themselves.
    """
    if isinstance(value, (*_NO_PARTS, *_NO_BATCH)) or is_container(value):
        return
    if torch.compiler.is_compiling():
        return
    if isinstance(value, (tuple, list)):
        if type(value) is list:
            _refuse_list_of_items(value, dim)
        parts = list(value)
    elif isinstance(value, Mapping) or record_items(value) is not None:
        parts = [item for name, item in named_children(value).items() if name not in shared]
    else:
        _refuse_hidden_tensors(value, size, dim)
        return
    for part in parts:
        refuse_unseen_items(part, size, dim, shared)


def _refuse_list_of_items(values: list[Any], dim: int) -> None:
    if len(values) < 2:
        return
    if all(is_graph(value) and count_graphs(value) == 1 for value in values):
        raise TypeError(
            f"batch holds a list of {len(values)} graphs; give one graph that joins them, "
            "Batch.from_data_list of PyTorch Geometric"
        )
    if not all(isinstance(value, Tensor) and not value.is_nested for value in values):
        return
    kinds = {(value.dim(), value.dtype) for value in values}
    if len(kinds) > 1 or values[0].dim() <= dim:
        return
    sizes = [value.shape[dim] for value in values]
    if len(set(sizes)) > 1:
        raise TypeError(
            f"batch holds a list of {len(values)} tensors whose sizes differ, {sizes[:4]}; if "
            "they are the items, pad or pack them (torch.nn.utils.rnn), or use "
            'passes="sequential" with fraction=1.0; if they are none, put them into a tuple'
        )


def _refuse_hidden_tensors(value: Any, size: int, dim: int) -> None:
    for tensor in _hidden_tensors(value, _DEPTH):
        if not tensor.is_nested and tensor.dim() > dim and tensor.shape[dim] == size:
            raise TypeError(
                f"batch holds a {type(value).__name__}, an object with a tensor of shape "
                f"{tuple(tensor.shape)} for its {size} items, which is not seen in it; give a "
                "mapping, a dataclass or a tuple of tensors instead, name the object in shared, or "
                'use passes="sequential" with fraction=1.0'
            )


def _hidden_tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, (*_NO_PARTS, *_NO_BATCH)):
        slots = [
            getattr(value, name, None)
            for kind in type(value).__mro__
            for name in kind.__dict__.get("__slots__", ())
            if name not in ("__dict__", "__weakref__")
        ]
        for part in (*children(value), *getattr(value, "__dict__", {}).values(), *slots):
            yield from _hidden_tensors(part, depth - 1)


def _is_pydantic(value: Any) -> bool:
    return hasattr(type(value), "model_fields") and hasattr(value, "__pydantic_extra__")
