"""Stacking: the items of a batch several times, or some of them, in a structure of the same type.

A stacked tensor holds pass 0 of the whole batch, then pass 1, and so on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from regdrop.arguments import check_integer
from regdrop.passes.containers import (
    count_graphs,
    find_graph_tensors,
    is_container,
    is_graph,
    take_from_container,
)
from regdrop.passes.packed_rows import (
    find_repetition,
    is_longest,
    refuse_hidden_documents,
    tell_documents,
)
from regdrop.passes.structures import (
    SIMPLE,
    as_names,
    children,
    find_leaves,
    find_names,
    is_array,
    named_children,
    rebuild_mapping,
    rebuild_record,
    record_items,
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
        A structure of the same type; for one graph a batch of graphs. Tensors whose size in `dim`
        is the batch size are stacked, (num_passes * batch, ...), as are lists of that length that
        hold no tensors, tuples of as many texts, arrays of NumPy and a `PackedSequence`; everything
        else passes through. Beside `cu_seq_lens` (or `cu_seqlens`), which tell the documents of
        packed rows, those of all passes follow each other, and `seq_idx` of one row counts on.

    Raises:
        TypeError: For an argument of the wrong type; if the batch holds a nested tensor, a sparse
            one of a kind that cannot be stacked, an object with tensors of the items that is none
            of these structures, or a list of tensors of different sizes.
        ValueError: If `num_passes` is below 1, no tensor tells the batch size, nothing has the one
            that is given, a name in `shared` is nowhere in the batch, documents in one row are told
            apart by `position_ids` alone, or nodes are numbered by an `edge_index` outside a graph
            of PyTorch Geometric.
    """
    check_integer("num_passes", num_passes, low=1)
    check_integer("dim", dim, low=0)
    check_integer("batch_size", batch_size, low=0, or_none=True)
    shared = as_names(shared)
    _check_names(batch, shared)
    size = find_batch_size(batch, dim) if batch_size is None else batch_size
    if num_passes > 1:
        refuse_unseen_items(batch, size, dim, shared)
    if batch_size is not None and not _holds_items(batch, size, dim):
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

    def repeat(items: Any) -> Any:
        if isinstance(items, Tensor):
            return items.repeat(*(num_passes if i == dim else 1 for i in range(items.dim())))
        return items * num_passes

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

    def take(items: Any) -> Any:
        if isinstance(items, Tensor):
            return items.index_select(0, index.to(items.device))
        return [items[position] for position in index.tolist()]

    return _map_items(batch, take, lambda size: index.tolist(), size, shared)


def first_items(
    batch: Batch, count: int, *, batch_size: int | None = None, shared: Iterable[str] = ()
) -> Batch:
    """Return the first `count` items, dense tensors as views, by the rules of `repeat_batch`."""
    return _map_items(
        batch, lambda items: items[:count], lambda size: [*range(count)], batch_size, shared
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
                return int(leaf.size(dim))
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
        function: From a tensor or a list of items to the changed one.
        find_index: From the number of items to the positions of those that it keeps, in order.
        size: Number of items.
        shared: Names of what passes through.
        dim: Dimension of the items in tensors.
    """

    function: Callable[[Any], Any]
    find_index: Callable[[int], list[int]]
    size: int
    shared: frozenset[str]
    dim: int

    @cached_property
    def index(self) -> list[int]:
        """Return the positions of the items that are kept."""
        return self.find_index(self.size)

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
    function: Callable[[Any], Any],
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
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, Tensor):
        if value.is_nested:
            raise TypeError(
                "batch holds a nested tensor, which is not stacked: two that share their lengths "
                'would no longer fit; use passes="sequential" with fraction=1.0, or a padded '
                "tensor with its mask"
            )
        if not _is_of_items(value, change.size, change.dim):
            return value
        is_dense = value.layout == torch.strided
        return change.function(value) if is_dense else _take_sparse(value, change)
    if isinstance(value, PackedSequence):
        is_of_items = _is_of_items(value, change.size, change.dim)
        return _take_sequences(value, change.index) if is_of_items else value
    if is_container(value):
        return take_from_container(value, change.index, change.size, change.dim)
    if isinstance(value, Mapping):
        return rebuild_mapping(value, _map_mapping(value, change))
    record = record_items(value)
    if record is not None:
        _refuse_edges(record, change)
        changed = {n: _map(item, change) for n, item in record.items() if n not in change.shared}
        return rebuild_record(value, changed)
    if _are_texts(value, change.size):
        return tuple(change.function(list(value)))
    if isinstance(value, tuple):
        items = [_map(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        if all(tensor.dim() == 0 for tensor in find_tensors(value)):
            return change.function(value) if len(value) == change.size else value
        return [_map(item, change) for item in value]
    if is_array(value) and _is_of_items(value, change.size, change.dim):
        return value.take(change.index, axis=change.dim)
    return value


def _are_texts(value: Any, size: int) -> bool:
    """Return whether a value is a tuple of one text an item, as torch's own collation gives."""
    is_of_items = type(value) is tuple and len(value) == size > 0
    return is_of_items and all(isinstance(item, (str, bytes)) for item in value)


def _is_of_items(value: Any, size: int, dim: int) -> bool:
    """Return whether a tensor, packed sequences, graphs or an array are those of the items."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0]) == size
    if is_graph(value):
        return count_graphs(value) == size
    if isinstance(value, Tensor) and value.is_nested:
        return value.size(dim) == size
    return len(value.shape) > dim and value.shape[dim] == size


def _holds_items(value: Any, size: int, dim: int) -> bool:
    """Return whether something in a structure is of the items."""
    if isinstance(value, (Tensor, PackedSequence)) or is_graph(value) or is_array(value):
        return _is_of_items(value, size, dim)
    if (isinstance(value, list) and len(value) == size) or _are_texts(value, size):
        return True
    return any(_holds_items(child, size, dim) for child in children(value))


def _map_mapping(value: Mapping[Any, Any], change: _Change) -> dict[Any, Any]:
    is_packed = tell_documents(value.keys())  # a TensorDict itself iterates over its rows
    if not is_packed:
        refuse_hidden_documents(value, lambda: len(change.index))
    _refuse_edges(value, change)
    changed = {}
    for name, item in value.items():
        repetition = find_repetition(name, item, change.size)
        if name in change.shared or (is_packed and is_longest(name)):
            changed[name] = item
        elif repetition is not None:
            changed[name] = repetition(item, change.times(name))
        else:
            changed[name] = _map(item, change)
    return changed


def _refuse_edges(value: Mapping[Any, Any], change: _Change) -> None:
    """Raise for edges by the numbers of their nodes, whose copies would have none."""
    edges = value.get("edge_index")
    if not isinstance(edges, Tensor) or edges.dim() != 2 or "edge_index" in change.shared:
        return
    if change.index != [*range(change.size)]:
        raise ValueError(
            "batch holds edge_index, which numbers the nodes of a graph: stacked nodes would have "
            "no edges; give a Data or a Batch of PyTorch Geometric, or use "
            'passes="sequential" with fraction=1.0'
        )


def _take_sparse(value: Tensor, change: _Change) -> Tensor:
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
    taken = value.to_sparse_coo().index_select(change.dim, index)
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
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {names}"
            raise ValueError(f"shared names {name!r}, which is nowhere in the batch; {hint}")
