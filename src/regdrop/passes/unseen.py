"""Items of a batch that stacking would miss, refused by name before a model sees half of them."""

import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from regdrop.passes.containers import count_graphs, is_container, is_graph
from regdrop.passes.items import LONGEST_SIZE, are_items, are_records_of_items
from regdrop.passes.numbered_rows import refuse_hidden_numbers
from regdrop.passes.packed_rows import tell_documents
from regdrop.passes.structures import (
    SIMPLE,
    cached_names,
    children,
    find_leaves,
    is_array,
    is_plain,
    is_pydantic,
    items_by_name,
)

# What is no structure, and what holds tensors that are none of a batch.
_LEAVES = (
    *(*SIMPLE, Tensor, PackedSequence),
    *(nn.Module, type, FunctionType, ModuleType, torch.Generator),
)
# What is mostly the same for all items, with a row for each class or each thing that is kept.
_TABLES = re.compile(
    r"(^|_)(prototypes?|codebook|memory_bank|class_(names|weights?|embeddings?|embeds|features)"
    r"|label_embeddings)$"
)
# How deep, and among how many parts, an object is looked into: a cache of keys holds layers, which
# hold tensors; a data set holds too much.
_DEPTH, _PARTS = 4, 1000


def refuse_unseen_items(batch: Any, size: int, dim: int, shared: Iterable[str]) -> None:
    """Raise where items would be missed: in an object, or one by one in a list.

    Compiled code is not looked at.

    Args:
        batch: The batch.
        size: Number of items.
        dim: Their dimension in tensors.
        shared: Names that pass through, whatever they hold.

    Raises:
        TypeError: For an object that is no structure and holds tensors of the items, and for a list
            of tensors of different sizes or of single graphs, which are items themselves.
        ValueError: For tensors of the nodes of a graph beside it.
    """
    if torch.compiler.is_compiling():
        return
    leaves = list(find_leaves(batch))
    _refuse_tensors_of_nodes(leaves, size)
    _refuse(batch, next(iter(leaves), None), size, dim, frozenset(shared))


def _refuse(value: Any, first: Any, size: int, dim: int, shared: frozenset[str]) -> None:
    if is_plain(value) or isinstance(value, _LEAVES):
        return
    is_builtin = type(value) in (dict, list, tuple)  # nearly always, and cheaper to see
    if not is_builtin and (is_container(value) or is_array(value)):
        return
    if are_items(value, size, dim):  # and repeated as such
        _refuse_items_of_unknown_number(value, first)
        _refuse_hidden_fields(value, size, dim)
        return
    if isinstance(value, list):
        _refuse_list_of_items(value, first, size, dim)
    items = items_by_name(value)
    if items is None:
        _refuse_column(value, size)
        _refuse_hidden(value, [value], size, dim)
        return
    if not isinstance(value, (list, tuple, Mapping)):
        known = (*items, *cached_names(value))  # what is cached is computed again
        _refuse_hidden(value, _attributes(value, without=known), size, dim)
    parts = {name: item for name, item in items.items() if name not in shared}
    _warn_of_tables(parts, size)
    _refuse_images_and_targets(list(parts.values()), size, dim)
    if not tell_documents(items):
        refuse_hidden_numbers(parts, size)
    for part in parts.values():
        _refuse(part, first, size, dim, shared)


def _warn_of_tables(parts: Mapping[Any, Any], size: int) -> None:
    """Warn of what seems to be the same for all items and has as many rows as they by chance."""
    for name, part in parts.items():
        if not isinstance(name, str) or not _TABLES.search(name):
            continue
        rows = part.shape[0] if isinstance(part, Tensor) and 0 < part.dim() < 3 else None
        if rows == size or (isinstance(part, (list, tuple)) and len(part) == size):
            warnings.warn(
                f"batch holds {name}, which has as many rows as there are items, {size}, and is "
                "repeated with them: name it in shared if it is the same for all items, else give "
                "it another name",
                stacklevel=2,
            )


def _refuse_column(value: Any, size: int) -> None:
    """Raise for a sequence of another kind, such as a column of pandas, with an entry an item."""
    is_sequence = isinstance(value, Sequence) or hasattr(type(value), "__array__")
    if not is_sequence or not hasattr(type(value), "__len__"):
        return
    try:
        length = len(value)
    except TypeError:  # a number, as an array without a dimension is
        return
    if length == size:
        raise TypeError(
            f"batch holds a {type(value).__name__} with an entry for each of the {size} items, "
            "which is not repeated: give a list, an array of NumPy or a tensor (list(values)); "
            "name it in shared if it is something else"
        )


def _refuse_list_of_items(values: list[Any], first: Any, size: int, dim: int) -> None:
    """Raise for a list of items by themselves: as long as the batch, or what told its size."""
    if len(values) < 2:
        return
    if all(is_graph(value) and count_graphs(value) == 1 for value in values):
        raise TypeError(
            f"batch holds a list of {len(values)} graphs; give one graph that joins them, "
            "Batch.from_data_list of PyTorch Geometric"
        )
    kinds = [_sizes(value, dim) for value in values]
    if None in kinds or len({names for names, _ in kinds if names is not None}) > 1:
        return
    told_the_size = any(leaf is first for leaf in find_leaves(values))
    if len(set(kinds)) > 1 and (len(values) == size or told_the_size):
        raise TypeError(
            f"batch holds a list of {len(values)} tensors (or arrays, or mappings), whose sizes "
            f"differ, {[sizes for _, sizes in kinds[:4]]}; if they are the items, pad or pack them "
            '(torch.nn.utils.rnn), or use passes="sequential" with fraction=1.0; if they are none, '
            "put them into a tuple"
        )


def _refuse_items_of_unknown_number(values: Sequence[Any], first: Any) -> None:
    """Raise where one item told the number of all, which is theirs by chance alone."""
    if any(leaf is first for leaf in find_leaves(values)):
        raise TypeError(
            f"batch holds a list of {len(values)} mappings, one an item, of which the first told "
            "the number of the items; put a tensor with a row for each item before it, or use "
            'passes="sequential" with fraction=1.0'
        )


def _refuse_hidden_fields(values: Sequence[Any], size: int, dim: int) -> None:
    """Raise for a few objects in a tuple of which each has tensors of all items, not of one."""
    if type(values) is not tuple or len(values) > LONGEST_SIZE:
        return
    if all(
        items_by_name(one) is None and _find_hidden([one], size, dim) is not None for one in values
    ):
        _refuse_hidden(values[0], values[:1], size, dim)


def _refuse_images_and_targets(parts: Sequence[Any], size: int, dim: int) -> None:
    """Raise for a list of images beside one of what each shows, as detectors take them."""
    lists = [part for part in parts if type(part) in (list, tuple) and not is_plain(part)]
    for images in lists:
        if not all(isinstance(image, Tensor) and image.dim() == 3 for image in images):
            continue
        for targets in lists:
            if (
                len(targets) == len(images)
                and are_records_of_items(targets, size, dim)
                and any(True for _ in find_leaves(targets))
            ):
                raise TypeError(
                    f"batch holds a list of {len(images)} images beside one of as many mappings, "
                    "which are not repeated as items; stack the images to one tensor, or use "
                    'passes="sequential" with fraction=1.0'
                )


def _sizes(value: Any, dim: int) -> Any:
    """Return what a tensor, an array or a mapping of them is, and its size; else None.

    What has no size, such as the number of an image, tells nothing.
    """
    if is_array(value):
        return ((value.ndim, value.dtype), value.shape[dim]) if value.ndim > dim else None
    if isinstance(value, Tensor):
        has_rows = not is_lazy(value) and not value.is_nested and value.dim() > dim
        return ((value.dim(), value.dtype), value.shape[dim]) if has_rows else None
    if not isinstance(value, Mapping) or is_container(value):
        return None
    found = {name: of for name, item in value.items() if (of := _sizes(item, dim)) is not None}
    if not found:
        return None
    return tuple((name, kind) for name, (kind, _) in found.items()), tuple(
        sizes for _, sizes in found.values()
    )


def _refuse_tensors_of_nodes(leaves: Sequence[Any], size: int) -> None:
    """Raise for a tensor of the nodes of a graph that is stacked by graphs, or not at all."""
    if len(leaves) == 1:
        return
    for graph in leaves:
        if not is_graph(graph) or graph.num_nodes == size == count_graphs(graph):
            continue
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == graph.num_nodes:
                raise ValueError(
                    f"batch holds a {type(graph).__name__} and, beside it, a tensor of shape "
                    f"{tuple(leaf.shape)} for its {graph.num_nodes} nodes; make the tensor an "
                    'attribute of the graph, or use passes="sequential" with fraction=1.0'
                )


def _refuse_hidden(value: Any, places: Iterable[Any], size: int, dim: int) -> None:
    found = _find_hidden(places, size, dim)
    if found is not None:
        raise TypeError(
            f"batch holds a {type(value).__name__}, an object with a tensor of shape "
            f"{tuple(found.shape)} for its {size} items, which is not seen in it; give a "
            "mapping, a dataclass or a tuple of tensors instead, name the object in shared, "
            "leave it out of the batch, or use "
            'passes="sequential" with fraction=1.0'
        )


def _find_hidden(places: Iterable[Any], size: int, dim: int) -> Any:
    """Return a tensor or an array of the items in some objects; None if there is none."""
    for found in islice(_hidden(places, _DEPTH), _PARTS):
        is_one = isinstance(found, Tensor) and not is_lazy(found) and not found.is_nested
        if (is_one or is_array(found)) and found.ndim > dim and found.shape[dim] == size:
            return found
    return None


def _hidden(values: Iterable[Any], depth: int) -> Iterator[Any]:
    """Yield everything in some objects, tensors among it."""
    for value in values:
        yield value
        if depth and not isinstance(value, _LEAVES) and not is_plain(value) and not is_array(value):
            inside = value if isinstance(value, (deque, set, frozenset)) else children(value)
            yield from _hidden(inside, depth - 1)
            yield from _hidden(_attributes(value), depth - 1)


def _attributes(value: Any, without: Iterable[str] = ()) -> list[Any]:
    """Return the attributes of an object, in its dictionary and its slots, but for some names."""
    found = dict(_own(value, "__dict__") or {})
    if is_pydantic(value):
        found.update(value.__pydantic_private__ or {})
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.endswith("__"):  # what Python keeps there itself, as __dict__
                continue
            is_private = name.startswith("__")
            full = f"_{kind.__name__.lstrip('_')}{name}" if is_private else name
            found[full] = _own(value, full)
    return [item for name, item in found.items() if name not in without]


def _own(value: Any, name: str) -> Any:
    """Return an attribute that an object has by itself; None where it is not set."""
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return None
