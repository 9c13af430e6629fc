"""Stacking: the items of a batch several times, or some of them, in a structure of the same type.

A stacked tensor holds pass 0 of the whole batch, then pass 1, and so on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from regdrop.passes.items import are_items, holds_items, is_of_items
from regdrop.passes.numbered_items import refuse_item_numbers
from regdrop.passes.numbered_rows import refuse_numbers
from regdrop.passes.packed_rows import (
    find_repetition,
    is_longest,
    refuse_hidden_documents,
    tell_documents,
)
from regdrop.passes.places import Place, find_place, find_told_dim
from regdrop.passes.structures import (
    SIMPLE,
    as_names,
    find_leaves,
    find_named_leaves,
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
    dim: int | Mapping[str, int] = 0,
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
        dim: Dimension of the items in every tensor: 1 for sequences (length, batch). A mapping
            gives it for tensors by their names, as {"src": 1}, and others have the items first. The
            losses take the batch first: transpose what the model returns, and the target.

    Returns:
        A structure of the same type; for one graph a batch of graphs. Tensors whose size in `dim`,
        or else in the first dimension, is the batch size are stacked, (num_passes * batch, ...), as
        are arrays of NumPy and a `PackedSequence`. Names tell states of recurrent networks, whose
        layers come first, and masks of attention (`regdrop.passes.places`). Lists with an entry for
        each item are repeated: of texts, numbers, or mappings of the boxes in each image. So are
        such tuples, unless they may be a size, as 2 to 4 numbers are. Everything else passes
        through. Beside `cu_seq_lens` (or `cu_seqlens`), which tell the documents of packed rows,
        those of all passes follow each other, and `seq_idx` of one row counts on.

    Raises:
        TypeError: For an argument of the wrong type; if the batch holds a nested tensor, a sparse
            one of a kind that cannot be stacked, an object with tensors of the items that is none
            of these structures, a list of tensors of different sizes, or one of images.
        ValueError: If `num_passes` is below 1, no tensor tells the batch size, nothing has the one
            that is given, a name in `shared` is nowhere in the batch, documents in one row are told
            apart by `position_ids` alone, or a tensor numbers the rows of others: `edge_index`
            outside a graph of PyTorch Geometric, `batch`, the offsets of bags, `neighbours`, an
            `adj` between all items, `lengths` of rows that are not padded; for a mask that may have
            the items in either of two dimensions, and a name in `dim` without items there.
    """
    check_integer("num_passes", num_passes, low=1)
    most, by_name = _split_dims(dim)
    check_integer("batch_size", batch_size, low=0, or_none=True)
    shared = as_names(shared)
    _check_names("shared", batch, shared)
    _check_names("dim", batch, by_name)
    size = find_batch_size(batch, dim) if batch_size is None else batch_size
    _check_dims(batch, size, by_name)
    if num_passes > 1:
        refuse_unseen_items(batch, size, most, shared)
    if batch_size is not None and not by_name and not holds_items(batch, size, most):
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
    dim: int | Mapping[str, int] = 0,
) -> Batch:
    """Return the batch stacked as by `repeat_batch`, unchecked: it may lack names in `shared`."""

    def repeat(items: Any, place: Place) -> Any:
        # Tensor.repeat would give up channels_last.
        return (
            torch.cat([items] * num_passes, place.dim)
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

    def take(items: Any, place: Place) -> Any:
        if not isinstance(items, Tensor):
            return [items[position] for position in index.tolist()]
        where = index.to(items.device)
        if place.rows != 1:
            where = (where[:, None] * place.rows + torch.arange(place.rows).to(where)).flatten()
        if place.dim == 0 and not items.is_contiguous():
            return items[where]  # index_select, whose gradient is cheaper, gives up channels_last
        return items.index_select(place.dim, where)

    return _map_items(batch, take, lambda size: index.tolist(), size, shared)


def first_items(
    batch: Batch, count: int, *, batch_size: int | None = None, shared: Iterable[str] = ()
) -> Batch:
    """Return the first `count` items, dense tensors as views, by the rules of `repeat_batch`."""

    def cut(items: Any, place: Place) -> Any:
        if not isinstance(items, Tensor):
            return items[:count]
        return items.narrow(place.dim, 0, count * place.rows)

    return _map_items(batch, cut, lambda size: [*range(count)], batch_size, shared)


def find_batch_size(batch: Any, dim: int | Mapping[str, int] = 0) -> int:
    """Return the number of items of a batch by the rules of `repeat_batch`.

    Raises:
        ValueError: If there is no tensor with that dimension.
    """
    return _tell_size(batch, dim)[0]


def name_size(batch: Any) -> str:
    """Return what told `find_batch_size` the number of items, in words."""
    _, name, leaf = _tell_size(batch, 0)
    shape = getattr(leaf, "shape", None)
    of_shape = "" if shape is None else f" of shape {tuple(shape)}"
    return f"{name or 'the first ' + type(leaf).__name__}{of_shape}"


def _tell_size(batch: Any, dim: int | Mapping[str, int]) -> tuple[int, str, Any]:
    """Return the number of items, the name of what told it, and that itself."""
    most, by_name = _split_dims(dim)
    named = named_children(batch)
    for name in _MODEL_INPUTS:
        value = named.get(name)
        place = by_name.get(name, most)
        if isinstance(value, Tensor) and value.dim() > place:
            return value.size(place), name, value  # a nested tensor has no shape
    of_arrays = None
    for names, leaf in find_named_leaves(batch):
        name = names[-1] if names and isinstance(names[-1], str) else ""
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0]), name, leaf
        if is_graph(leaf):
            return count_graphs(leaf), name, leaf
        place = find_told_dim(names, leaf.ndim, most, by_name)
        if leaf.ndim > place:
            if isinstance(leaf, Tensor):
                return leaf.size(place), name, leaf  # no int: it may be a symbol
            of_arrays = (int(leaf.shape[place]), name, leaf) if of_arrays is None else of_arrays
    if of_arrays is not None:
        return of_arrays
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


def _map_items(
    batch: Batch,
    function: Callable[[Any, Place], Any],
    find_index: Callable[[int], list[int]],
    batch_size: int | None,
    shared: Iterable[str],
    dim: int | Mapping[str, int] = 0,
) -> Batch:
    most, by_name = _split_dims(dim)
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


def _split_dims(dim: int | Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
    """Return the dimension of the items in most tensors, and those of tensors by their names."""
    if not isinstance(dim, Mapping):
        check_integer("dim", dim, low=0)
        return dim, {}
    for name, place in dim.items():
        check_integer(f"dim[{name!r}]", place, low=0)
    return 0, dim


def _check_names(argument: str, batch: Any, asked: Iterable[str]) -> None:
    """Raise for a name in an argument that is nowhere in the batch."""
    if not asked:
        return
    names = sorted({name for name in find_names(batch) if isinstance(name, str)})
    for name in asked:
        if name not in names:
            hint = nearest(name, names) or f"; it has {names}"
            raise ValueError(f"{argument} names {name!r}, which is nowhere in the batch{hint}")


def _check_dims(batch: Any, size: int, by_name: Mapping[str, int]) -> None:
    """Raise for a name whose tensors have no items in the dimension that is given for it."""
    for name, dim in by_name.items():
        shapes = [
            tuple(leaf.shape)
            for names, leaf in find_named_leaves(batch)
            if name in names and hasattr(leaf, "shape")
        ]
        if not any(len(shape) > dim and shape[dim] == size for shape in shapes):
            raise ValueError(
                f"dim[{name!r}]={dim} must be where it has the {size} items, got tensors of the "
                f"shapes {shapes[:4]}"
            )
