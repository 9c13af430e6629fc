"""What in a batch is of its items: the tensors with a row for each, the lists with an entry."""

from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Number
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from regdrop.passes.containers import count_graphs, is_graph
from regdrop.passes.structures import children, find_leaves, is_array, is_plain, named_children

# A tuple of numbers is a size, as that of an image, up to this length.
LONGEST_SIZE = 4
# What sizes are made of, and settings.
_SETTINGS = (
    *(Number, torch.SymInt, torch.SymFloat, torch.SymBool, type(None), slice, Enum, type),
    *(torch.dtype, torch.device, torch.Generator, nn.Module, FunctionType),
)


def find_dim(value: Any, size: int, dim: int) -> int | None:
    """Return the dimension of a tensor or an array that has the items; None if none has.

    That is `dim`, else the first: lengths and nn.Transformer's padding masks have them there.
    """
    if isinstance(value, Tensor) and value.is_nested:
        return dim if value.size(dim) == size else None
    shape = value.shape
    return next((place for place in (dim, 0) if len(shape) > place and shape[place] == size), None)


def is_of_items(value: Any, size: int, dim: int) -> bool:
    """Return whether a tensor, packed sequences, graphs or an array are those of the items."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0]) == size
    if is_graph(value):
        return count_graphs(value) == size
    return find_dim(value, size, dim) is not None


def are_items(value: Any, size: int, dim: int) -> bool:
    """Return whether a list or a tuple has an entry for each item, so that it is repeated whole.

    It is as long as the batch then, and no structure: not the fields of the items, nor a few
    numbers or settings, as of the size of an image. With tensors it is one of mappings or records,
    as of the boxes in each image, whose rows are not those of the batch.
    """
    is_list = isinstance(value, list)
    if not (is_list or type(value) is tuple) or len(value) != size:
        return False
    if any(_has_rows(leaf) for leaf in find_leaves(value)):
        return are_records_of_items(value, size, dim)
    return is_list or not (_may_be_a_size(value) or _are_fields(value, size, dim))


def are_records_of_items(values: Sequence[Any], size: int, dim: int) -> bool:
    """Return whether mappings or records are those of one item each, alike and not all fields."""
    names = [frozenset(named_children(value)) for value in values]
    are_alike = bool(names) and bool(names[0]) and len({*names}) == 1
    return are_alike and (_are_boxes(values) or not _are_fields(values, size, dim))


def holds_items(value: Any, size: int, dim: int) -> bool:
    """Return whether something in a structure is of the items."""
    if isinstance(value, (Tensor, PackedSequence)) or is_graph(value) or is_array(value):
        return is_of_items(value, size, dim)
    if are_items(value, size, dim):
        return True
    return not is_plain(value) and any(holds_items(part, size, dim) for part in children(value))


def _has_rows(leaf: Any) -> bool:
    return not is_array(leaf) and (not isinstance(leaf, Tensor) or leaf.dim() > 0)


def _are_fields(value: Sequence[Any], size: int, dim: int) -> bool:
    """Return whether every entry is of all items, as those of both sentences of pairs are."""
    return all(holds_items(entry, size, dim) for entry in value)


def _are_boxes(value: Sequence[Any]) -> bool:
    """Return whether the entries are what torchvision's detectors take for each image.

    By chance, every image may have as many boxes as there are images.
    """
    return all(isinstance(entry, Mapping) and "boxes" in entry for entry in value)


def _may_be_a_size(value: Sequence[Any]) -> bool:
    if len(value) > LONGEST_SIZE:
        return all(entry is None for entry in value)
    return any(isinstance(entry, _SETTINGS) for entry in value)
