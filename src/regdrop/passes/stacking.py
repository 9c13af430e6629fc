"""Stacking: the items of a batch several times, or some of them, in a structure of the same type.

A stacked tensor holds pass 0 of the whole batch, then pass 1, and so on.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from regdrop.arguments import check_integer, nearest
from regdrop.passes.batch_size import find_batch_size, split_dims
from regdrop.passes.containers import find_graph_tensors, is_graph
from regdrop.passes.item_changes import change_items
from regdrop.passes.items import holds_items
from regdrop.passes.places import Place
from regdrop.passes.structures import as_names, find_leaves, find_named_leaves, find_names
from regdrop.passes.unseen import refuse_unseen_items

Batch = TypeVar("Batch")


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
            of these structures, or a list of tensors that are items themselves: of different
            lengths, or images beside a list of mappings.
        ValueError: If `num_passes` is below 1, no tensor tells the batch size, nothing has the one
            that is given, a name in `shared` is nowhere in the batch, documents in one row are told
            apart by `position_ids` alone, or a tensor numbers the rows of others: `edge_index`
            outside a graph of PyTorch Geometric, `batch`, the offsets of bags, `neighbours`, an
            `adj` between all items, `lengths` of rows that are not padded; for a mask that may have
            the items in either of two dimensions, and a name in `dim` without items there.
    """
    check_integer("num_passes", num_passes, low=1)
    most, by_name = split_dims(dim)
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

    return change_items(batch, repeat, index, batch_size, shared, dim)


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

    return change_items(batch, take, lambda size: index.tolist(), size, shared)


def first_items(
    batch: Batch, count: int, *, batch_size: int | None = None, shared: Iterable[str] = ()
) -> Batch:
    """Return the first `count` items, dense tensors as views, by the rules of `repeat_batch`."""

    def cut(items: Any, place: Place) -> Any:
        if not isinstance(items, Tensor):
            return items[:count]
        return items.narrow(place.dim, 0, count * place.rows)

    return change_items(batch, cut, lambda size: [*range(count)], batch_size, shared)


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a structure, as `repeat_batch` looks for them, in order."""
    for leaf in find_leaves(value):
        if isinstance(leaf, PackedSequence):
            yield from (part for part in leaf if isinstance(part, Tensor))
        elif is_graph(leaf):
            yield from find_graph_tensors(leaf)
        elif isinstance(leaf, Tensor):
            yield leaf


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
