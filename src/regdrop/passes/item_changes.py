"""What becomes of the items of a batch, wherever they are in it; the rest passes through."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from regdrop.passes.batch_size import find_batch_size, split_dims
from regdrop.passes.containers import is_container, take_from_container
from regdrop.passes.items import are_items, is_of_items
from regdrop.passes.numbered_items import refuse_item_numbers
from regdrop.passes.numbered_rows import refuse_numbers
from regdrop.passes.packed_rows import (
    find_repetition,
    is_longest,
    refuse_hidden_documents,
    tell_documents,
)
from regdrop.passes.places import Place, find_place
from regdrop.passes.structures import (
    SIMPLE,
    as_names,
    is_array,
    is_plain,
    map_items,
    named_children,
    rebuild_sequence,
)

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class _Change:
    """What becomes of the items of a batch, and what they are.

    Attributes:
        function: From a tensor or a list of items, and where they are in it, to the changed one.
        find_index: From the number of items to the positions of those that it keeps, in order.
        size: Number of items.
        shared: Names of what passes through.
        dim: Dimension of the items in tensors.
        dims: That of tensors by their names.
        is_told: Whether `dim` is that of a name, so that no other can be meant.
    """

    function: Callable[[Any, Place], Any]
    find_index: Callable[[int], list[int]]
    size: int
    shared: frozenset[str]
    dim: int
    dims: Mapping[str, int]
    is_told: bool = False

    @cached_property
    def index(self) -> list[int]:
        """Return the positions of the items that are kept."""
        return self.find_index(self.size)

    def inside(self, name: Any) -> "_Change":
        """Return what becomes of what has a name."""
        if name not in self.dims:
            return self
        return replace(self, dim=self.dims[name], is_told=True)

    def find_place(self, name: Any, value: Any) -> Place | None:
        """Return where a tensor or an array of some name has the items; None if it has none."""
        if not self.is_told:
            return find_place(name, value, self.size, self.dim, self.is_whole)
        has_items = value.ndim > self.dim and value.shape[self.dim] == self.size
        return Place(self.dim) if has_items else None

    def is_whole(self) -> bool:
        """Return whether every item appears once, in order."""
        return self.index == [*range(self.size)]

    def times(self, name: str) -> int:
        """Return how often all items appear.

        Raises:
            ValueError: If some appear and others do not.
        """
        times = len(self.index) // max(1, self.size)
        if self.index != [*range(self.size)] * times:
            raise ValueError(
                f"{name} tells where the documents of packed rows begin: a part of the rows cannot "
                f"be taken, got the rows {self.index} of {self.size}; take all of them, which "
                f"RDropConfig does with fraction=1.0"
            )
        return times


def change_items(
    batch: Batch,
    function: Callable[[Any, Place], Any],
    find_index: Callable[[int], list[int]],
    batch_size: int | None,
    shared: Iterable[str],
    dim: int | Mapping[str, int] = 0,
) -> Batch:
    """Return a batch whose items are changed, by the rules of `repeat_batch`.

    Args:
        batch: The batch.
        function: From a tensor or a list of items, and where they are in it, to the changed one.
        find_index: From the number of items to the positions of those that it keeps, in order.
        batch_size: Number of items; by default `find_batch_size` tells it.
        shared: Names of what passes through.
        dim: Dimension of the items in tensors.

    Raises:
        TypeError: For what `repeat_batch` refuses.
        ValueError: Likewise.
    """
    most, by_name = split_dims(dim)
    size = find_batch_size(batch, dim) if batch_size is None else batch_size
    names = frozenset(as_names(shared))
    # Nothing beside a tensor alone has the items elsewhere.
    is_told = isinstance(batch, Tensor) and not batch.is_nested and batch.dim() > most
    mapped: Batch = _map(
        batch, _Change(function, find_index, size, names, most, by_name, is_told), None
    )
    return mapped


def _map(value: Any, change: _Change, name: Any) -> Any:
    """Return what becomes of a value, of some name or in a list or tuple of that name."""
    size, dim = change.size, change.dim
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, Tensor):
        if value.is_nested:
            raise TypeError(
                "batch holds a nested tensor, which is not stacked: two that share their lengths "
                'would no longer fit; use passes="sequential" with fraction=1.0, or a padded '
                "tensor with its mask"
            )
        place = change.find_place(name, value)
        if place is None:
            return value
        is_dense = value.layout == torch.strided
        return change.function(value, place) if is_dense else _take_sparse(value, change, place.dim)
    if isinstance(value, PackedSequence):
        return _take_sequences(value, change.index) if is_of_items(value, size, dim) else value
    if is_container(value):
        return take_from_container(value, change.index, size, dim)
    if is_array(value):
        place = change.find_place(name, value)
        return value if place is None else value.take(_rows(change.index, place), axis=place.dim)
    if are_items(value, size, dim):
        return rebuild_sequence(value, change.function(list(value), Place(0)))
    if is_plain(value):
        return value
    by_name = _map_by_name(named_children(value), change)

    def inside(own: Any, item: Any) -> Any:
        if own in by_name:
            return by_name[own]
        return _map(item, change.inside(own), own if isinstance(own, str) else name)

    return map_items(inside, value)


def _rows(index: list[int], place: Place) -> list[int]:
    return [row * place.rows + i for row in index for i in range(place.rows)]


def _map_by_name(value: Mapping[Any, Any], change: _Change) -> dict[Any, Any]:
    """Return what becomes of the items of a structure that are told by their names."""
    if not value:
        return {}
    is_packed = tell_documents(value)
    if not is_packed:
        refuse_hidden_documents(value, lambda: len(change.index))
    own = {name: item for name, item in value.items() if name not in change.shared}
    refuse_numbers(own, change.size, change.dim, change.is_whole)
    if not is_packed:
        refuse_item_numbers(own, change.size, change.dim, change.is_whole)
    changed = {}
    for name, item in value.items():
        repetition = find_repetition(name, item, change.size)
        if name in change.shared or (is_packed and is_longest(name)):
            changed[name] = item
        elif repetition is not None:
            changed[name] = repetition(item, change.times(name))
    return changed


def _take_sparse(value: Tensor, change: _Change, dim: int) -> Tensor:
    is_known = value.layout == torch.sparse_coo or (
        value.layout in (torch.sparse_csr, torch.sparse_csc) and value.dim() == 2
    )
    if not is_known or value.requires_grad:
        raise TypeError(
            "batch holds a sparse tensor that cannot be stacked: it must be COO, or CSR or CSC of "
            f"two dimensions, without a gradient, got {value.layout} of shape "
            f"{tuple(value.shape)} with requires_grad={value.requires_grad}; use its to_dense()"
        )
    index = torch.tensor(change.index, device=value.device)
    taken = value.to_sparse_coo().index_select(dim, index)
    found: Tensor = taken.to_sparse(layout=value.layout)
    return found


def _take_sequences(packed: PackedSequence, index: list[int]) -> PackedSequence:
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    return pack_padded_sequence(
        padded[index], lengths[index], batch_first=True, enforce_sorted=False
    )
