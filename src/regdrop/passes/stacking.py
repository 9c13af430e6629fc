"""Stacking: the items of a batch several times, or some of them, in a structure of the same type.

A stacked tensor holds pass 0 of the whole batch, then pass 1, and so on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from regdrop.arguments import check_integer, nearest
from regdrop.passes.containers import (
    count_graphs,
    find_graph_tensors,
    is_container,
    is_graph,
    take_from_container,
)
from regdrop.passes.items import are_items, find_dim, holds_items, is_of_items
from regdrop.passes.numbered_rows import refuse_numbers
from regdrop.passes.packed_rows import (
    find_repetition,
    is_longest,
    refuse_hidden_documents,
    tell_documents,
)
from regdrop.passes.structures import (
    SIMPLE,
    as_names,
    find_leaves,
    find_names,
    is_array,
    is_plain,
    map_items,
    named_children,
    rebuild_sequence,
)
from regdrop.passes.unseen import refuse_unseen_items

Batch = TypeVar("Batch")

# Tensors whose first dimension is the batch size in the Hugging Face libraries.
_MODEL_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features")


def repeat_batch(
    batch: Batch,
    num_passes: int = 2,
    *,
    batch_size: int | None = None,
    shared: Iterable[str] = (),
    dim: int = 0,
) -> Batch:
    """Return the batch stacked `num_passes` times, in a new structure; the caller's is untouched.

    Args:
        batch: A tensor, or a tuple, list, mapping or dataclass of them, nested at will; also a
            class of attrs or pydantic, a `SimpleNamespace`, a TensorDict or tensorclass, and a
            graph or a batch of graphs of PyTorch Geometric, whose items are its graphs.
        num_passes: How often every item appears.
        batch_size: Number of items; by default the size of `input_ids`, `inputs_embeds`,
            `pixel_values` or `input_features` in `dim`, else of the first tensor.
        shared: Names in mappings and of fields that pass through as they are.
        dim: Dimension of the items in every tensor: 1 for sequences (length, batch). The losses
            take the batch first: transpose what the model returns, and the target.

    Returns:
        A structure of the same type; for one graph a batch of graphs. Tensors whose size in `dim`,
        or else in the first dimension, is the batch size are stacked, (num_passes * batch, ...), as
        are arrays of NumPy and a `PackedSequence`. Lists with an entry for each item are repeated:
        of texts, numbers, or mappings of the boxes in each image. So are such tuples, unless they
        may be a size, as 2 to 4 numbers are. Everything else passes through. Beside `cu_seq_lens`
        (or `cu_seqlens`), which tell the documents of packed rows, those of all passes follow each
        other, and `seq_idx` of one row counts on.

    Raises:
        TypeError: For an argument of the wrong type; if the batch holds a nested tensor, a sparse
            one of a kind that cannot be stacked, an object with tensors of the items that is none
            of these structures, a list of tensors of different sizes, or one of images.
        ValueError: If `num_passes` is below 1, no tensor tells the batch size, nothing has the one
            that is given, a name in `shared` is nowhere in the batch, documents in one row are told
            apart by `position_ids` alone, or a tensor numbers the rows of others: `edge_index`
            outside a graph of PyTorch Geometric, `batch`, the offsets of bags.
    """
    check_integer("num_passes", num_passes, low=1)
    check_integer("dim", dim, low=0)
    check_integer("batch_size", batch_size, low=0, or_none=True)
    shared = as_names(shared)
    _check_names(batch, shared)
    size = find_batch_size(batch, dim) if batch_size is None else batch_size
    if num_passes > 1:
        refuse_unseen_items(batch, size, dim, shared)
    if batch_size is not None and not holds_items(batch, size, dim):
        raise ValueError(
            f"batch_size={batch_size} is the size of nothing in the batch in dimension {dim}, so "
            "that nothing would be repeated"
        )
    return repeat_items(batch, num_passes, batch_size=size, shared=shared, dim=dim)


def repeat_items(
    batch: Batch,
    num_passes: int,
    *,
    batch_size: int | None = None,
    shared: Iterable[str] = (),
    dim: int = 0,
) -> Batch:
    """Return the batch stacked as by `repeat_batch`, unchecked: it may lack names in `shared`."""

    def repeat(items: Any, dim: int) -> Any:
        # Tensor.repeat would give up channels_last.
        return (
            torch.cat([items] * num_passes, dim)
            if isinstance(items, Tensor)
            else items * num_passes
        )

    def index(size: int) -> list[int]:
        return [*range(size)] * num_passes

    return _map_items(batch, repeat, index, batch_size, shared, dim)


def take_items(
    batch: Batch, index: Tensor, *, batch_size: int | None = None, shared: Iterable[str] = ()
) -> Batch:
    """Return the items of a batch at the positions `index`, (n,), by the rules of `repeat_batch`.

    A position may appear several times.

    Raises:
        TypeError: For what `repeat_batch` refuses.
        ValueError: If the rows are packed (see `repeat_batch`) and some of them are to be taken.
    """
    size = find_batch_size(batch) if batch_size is None else batch_size
    shared = as_names(shared)
    refuse_unseen_items(batch, size, 0, shared)

    def take(items: Any, dim: int) -> Any:
        if not isinstance(items, Tensor):
            return [items[position] for position in index.tolist()]
        where = index.to(items.device)
        # index_select, whose gradient is cheaper, would give up channels_last.
        return items.index_select(dim, where) if items.is_contiguous() else items[where]

    return _map_items(batch, take, lambda size: index.tolist(), size, shared)


def first_items(
    batch: Batch, count: int, *, batch_size: int | None = None, shared: Iterable[str] = ()
) -> Batch:
    """Return the first `count` items, dense tensors as views, by the rules of `repeat_batch`."""
    return _map_items(
        batch, lambda items, dim: items[:count], lambda size: [*range(count)], batch_size, shared
    )


def find_batch_size(batch: Any, dim: int = 0) -> int:
    """Return the number of items of a batch by the rules of `repeat_batch`.

    Raises:
        ValueError: If there is no tensor with that dimension.
    """
    named = named_children(batch)
    for name in _MODEL_INPUTS:
        value = named.get(name)
        if isinstance(value, Tensor) and value.dim() > dim:
            return value.size(dim)  # a nested tensor has no shape
    of_arrays = None
    for leaf in find_leaves(batch):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if is_graph(leaf):
            return count_graphs(leaf)
        if leaf.ndim > dim:
            if isinstance(leaf, Tensor):
                return leaf.size(dim)  # no int: it may be a symbol
            of_arrays = leaf.shape[dim] if of_arrays is None else of_arrays
    if of_arrays is not None:
        return int(of_arrays)
    raise ValueError(
        f"batch must hold a tensor with a batch dimension, or batch_size must be given; "
        f"got {type(batch).__name__} without one; tensors are seen in tuples, lists, mappings, "
        "dataclasses and their like"
    )


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a structure, as `repeat_batch` looks for them, in order."""
    for leaf in find_leaves(value):
        if isinstance(leaf, PackedSequence):
            yield from (part for part in leaf if isinstance(part, Tensor))
        elif is_graph(leaf):
            yield from find_graph_tensors(leaf)
        elif isinstance(leaf, Tensor):
            yield leaf


@dataclass(frozen=True)
class _Change:
    """What becomes of the items of a batch, and what they are.

    Attributes:
        function: From a tensor or a list of items, and their dimension, to the changed one.
        find_index: From the number of items to the positions of those that it keeps, in order.
        size: Number of items.
        shared: Names of what passes through.
        dim: Dimension of the items in tensors.
    """

    function: Callable[[Any, int], Any]
    find_index: Callable[[int], list[int]]
    size: int
    shared: frozenset[str]
    dim: int

    @cached_property
    def index(self) -> list[int]:
        """Return the positions of the items that are kept."""
        return self.find_index(self.size)

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


def _map_items(
    batch: Batch,
    function: Callable[[Any, int], Any],
    find_index: Callable[[int], list[int]],
    batch_size: int | None,
    shared: Iterable[str],
    dim: int = 0,
) -> Batch:
    size = find_batch_size(batch, dim) if batch_size is None else batch_size
    names = frozenset(as_names(shared))
    mapped: Batch = _map(batch, _Change(function, find_index, size, names, dim))
    return mapped


def _map(value: Any, change: _Change) -> Any:
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
        place = find_dim(value, size, dim)
        if place is None:
            return value
        is_dense = value.layout == torch.strided
        return change.function(value, place) if is_dense else _take_sparse(value, change, place)
    if isinstance(value, PackedSequence):
        return _take_sequences(value, change.index) if is_of_items(value, size, dim) else value
    if is_container(value):
        return take_from_container(value, change.index, size, dim)
    if is_array(value):
        place = find_dim(value, size, dim)
        return value if place is None else value.take(change.index, axis=place)
    if are_items(value, size, dim):
        return rebuild_sequence(value, change.function(list(value), 0))
    if is_plain(value):
        return value
    by_name = _map_by_name(named_children(value), change)
    return map_items(
        lambda name, item: by_name[name] if name in by_name else _map(item, change), value
    )


def _map_by_name(value: Mapping[Any, Any], change: _Change) -> dict[Any, Any]:
    """Return what becomes of the items of a structure that are told by their names."""
    if not value:
        return {}
    is_packed = tell_documents(value)
    if not is_packed:
        refuse_hidden_documents(value, lambda: len(change.index))
    own = {name: item for name, item in value.items() if name not in change.shared}
    refuse_numbers(own, change.size, change.dim, change.is_whole)
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


def _check_names(batch: Any, shared: tuple[str, ...]) -> None:
    """Raise for a name in `shared` that is nowhere in the batch."""
    if not shared:
        return
    names = sorted({name for name in find_names(batch) if isinstance(name, str)})
    for name in shared:
        if name not in names:
            hint = nearest(name, names) or f"; it has {names}"
            raise ValueError(f"shared names {name!r}, which is nowhere in the batch{hint}")
