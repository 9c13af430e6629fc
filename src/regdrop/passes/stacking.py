"""Stacking: the items of a batch several times, or some of them, in a structure of the same type.

A stacked tensor holds pass 0 of the whole batch, then pass 1, and so on.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

Batch = TypeVar("Batch")

# Tensors whose first dimension is the batch size in the Hugging Face libraries.
_MODEL_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features")


def repeat_batch(
    batch: Batch,
    num_passes: int = 2,
    *,
    batch_size: int | None = None,
    shared: Iterable[str] = (),
) -> Batch:
    """Return the batch stacked `num_passes` times, in a new structure; the caller's is untouched.

    Args:
        batch: A tensor, or a tuple, list, mapping or dataclass of them, nested at will.
        num_passes: How often every item appears.
        batch_size: Number of items; by default the first dimension of `input_ids`,
            `inputs_embeds`, `pixel_values` or `input_features`, else of the first tensor.
        shared: Names in mappings and dataclasses that pass through as they are.

    Returns:
        A structure of the same type. Tensors whose first dimension is the batch size are
        stacked, (num_passes * batch, ...), as are lists of that length that hold no tensors;
        everything else passes through.

    Raises:
        TypeError: If `num_passes` is no integer.
        ValueError: If `num_passes` is below 1, or no tensor tells the batch size.
    """
    if isinstance(num_passes, bool) or not isinstance(num_passes, int):
        raise TypeError(f"num_passes must be an integer, got {type(num_passes).__name__}")
    if num_passes < 1:
        raise ValueError(f"num_passes must be at least 1, got {num_passes}")

    def repeat(items: Any) -> Any:
        if isinstance(items, Tensor):
            return items.repeat(num_passes, *[1] * (items.dim() - 1))
        return items * num_passes

    return _map_items(batch, repeat, batch_size, shared)


def take_items(
    batch: Batch, index: Tensor, *, batch_size: int | None = None, shared: Iterable[str] = ()
) -> Batch:
    """Return the items of a batch at the positions `index`, (n,), by the rules of `repeat_batch`.

    A position may appear several times.
    """

    def take(items: Any) -> Any:
        if isinstance(items, Tensor):
            return items.index_select(0, index.to(items.device))
        return [items[position] for position in index.tolist()]

    return _map_items(batch, take, batch_size, shared)


def first_items(
    batch: Batch, count: int, *, batch_size: int | None = None, shared: Iterable[str] = ()
) -> Batch:
    """Return views of the first `count` items of a batch, by the rules of `repeat_batch`."""
    return _map_items(batch, lambda items: items[:count], batch_size, shared)


def find_batch_size(batch: Any) -> int:
    """Return the number of items of a batch by the rules of `repeat_batch`.

    Raises:
        ValueError: If there is no tensor with a first dimension.
    """
    for name in _MODEL_INPUTS:
        value = _named(batch, name)
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    first = _first_tensor(batch)
    if first is None:
        raise ValueError(
            f"batch must hold a tensor with a batch dimension, or batch_size must be given; "
            f"got {type(batch).__name__} without one"
        )
    return first.shape[0]


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a structure of tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    children: Iterable[Any] = ()
    if isinstance(value, Mapping):
        children = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        children = (getattr(value, field.name) for field in fields(value))
    elif isinstance(value, (tuple, list)):
        children = value
    for child in children:
        yield from find_tensors(child)


def _map_items(
    batch: Batch, function: Callable[[Any], Any], batch_size: int | None, shared: Iterable[str]
) -> Batch:
    size = find_batch_size(batch) if batch_size is None else batch_size
    names = frozenset((shared,) if isinstance(shared, str) else shared)
    mapped: Batch = _map(batch, function, size, names)
    return mapped


def _map(value: Any, function: Callable[[Any], Any], size: int, shared: frozenset[str]) -> Any:
    if isinstance(value, Tensor):
        return function(value) if value.dim() > 0 and value.shape[0] == size else value
    if isinstance(value, Mapping):
        changed = {
            name: item if name in shared else _map(item, function, size, shared)
            for name, item in value.items()
        }
        return _rebuild_mapping(value, changed)
    if is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in fields(value):
            if field.name not in shared:
                item = _map(getattr(value, field.name), function, size, shared)
                # A frozen dataclass is filled the way its own __init__ does it.
                object.__setattr__(result, field.name, item)
        return result
    if isinstance(value, tuple):
        items = [_map(item, function, size, shared) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        if _first_tensor(value) is None:
            return function(value) if len(value) == size else value
        return [_map(item, function, size, shared) for item in value]
    return value


def _rebuild_mapping(original: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
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


def _named(batch: Any, name: str) -> Any:
    if isinstance(batch, Mapping):
        return batch.get(name)
    return getattr(batch, name, None) if is_dataclass(batch) else None


def _first_tensor(value: Any) -> Tensor | None:
    return next((tensor for tensor in find_tensors(value) if tensor.dim() > 0), None)
