"""Tensors that number the rows of others, as edges number nodes and offsets the words of a bag.

Stacked they would number the rows of the first pass again, which no error shows.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regdrop.passes.items import find_dim
from regdrop.passes.structures import find_leaves
from regdrop.tracing import can_read

_EDGES = re.compile(r"(^|_)edge_index(_|$)")
_ENDS_OF_EDGES = ({"senders", "receivers"}, {"src", "dst"})
_OWNERS = re.compile(r"batch(_(idx|index|vec|vector))?")
_STARTS = re.compile(r"(^|_)(offsets?|ptr|indptr|row_splits)$")
_ENTRIES = re.compile(r"(^|_)(indices|values)$")

_NODES = (
    "numbers the nodes of a graph: stacked nodes would have no edges; give a Data or a Batch of "
    "PyTorch Geometric"
)
_GROUPS = (
    "numbers the graph, cloud or image of every row: those of all passes would be one; count it on "
    "from pass to pass"
)
_BEGINNINGS = (
    "tells where the rows of every item begin among those of another tensor: count it on from pass "
    "to pass (torch.cat([offsets, offsets + len(indices)]))"
)
WAYS_OUT = (
    ', or use passes="sequential" with fraction=1.0; if it is something else, give it {}; name it '
    "in shared only if it is the same for all passes"
)
# So many labels seldom go up by chance, and never so many count from 0 in all of several lists.
_FEW, _MANY = 4, 16


def refuse_numbers(
    value: Mapping[Any, Any], size: int, dim: int, is_whole: Callable[[], bool]
) -> None:
    """Raise for numbers of rows that are told by their names.

    Args:
        value: The entries of a batch, by name.
        size: Number of items.
        dim: Their dimension in tensors.
        is_whole: Returns whether the items stay as they are, so that nothing has to be counted on.

    Raises:
        ValueError: For such an entry, by its name.
    """
    items = {name: item for name, item in value.items() if isinstance(name, str)}
    for name, item in items.items():
        dims = item.dim() if isinstance(item, Tensor) and not item.is_nested else 0
        is_end = dims == 1 and _is_end_of_edges(name, item, items, size)
        if (dims == 2 and _EDGES.search(name)) or is_end:
            meaning = _NODES
        elif dims == 1 and _OWNERS.fullmatch(name) and _are_owners(name, item):
            meaning = _GROUPS
        elif _STARTS.search(name) and _are_starts(name, item, items, size, dim):
            meaning = _BEGINNINGS
        else:
            continue
        if not is_whole():
            ways_out = WAYS_OUT.format("another name")
            raise ValueError(f"batch holds {name}, which {meaning}{ways_out}")


def refuse_hidden_numbers(parts: Mapping[Any, Any], size: int) -> None:
    """Raise for places where items begin that their values tell, which are read on the CPU alone.

    They go up from 0, and not further than another tensor has rows.

    Args:
        parts: What stands side by side in a structure, by names or places.
        size: Number of items.

    Raises:
        ValueError: For such a tensor, by its values.
    """
    known = {
        name: tensors
        for name, part in parts.items()
        if (tensors := _read_integers(part, size)) is not None
    }
    for name, starts in known.items():
        others = [rows for other, rows in known.items() if other != name]
        is_alone = len(starts) == 1 and len(starts[0]) != size
        if any(_begin_among(starts, rows, size) for rows in others) or (
            is_alone and _end_at(starts[0], _count_rows(parts.values(), size))
        ):
            what = name if isinstance(name, str) else f"a tensor of shape {tuple(starts[0].shape)}"
            ways_out = WAYS_OUT.format("a second dimension (numbers[:, None])")
            raise ValueError(
                f"batch holds {what}, {starts[0][:4].tolist()} and so on, which "
                f"{_BEGINNINGS}{ways_out}"
            )


def _is_end_of_edges(name: str, item: Tensor, items: Mapping[str, Any], size: int) -> bool:
    """Return whether one end of each edge has such a name; as many as the items are a feature."""
    if not any(name in ends for ends in _ENDS_OF_EDGES) or not is_integral(item):
        return False
    is_graph = items.keys() >= {"senders", "receivers"}
    has_other = name in ("senders", "receivers") or items.keys() >= {"src", "dst"}
    return is_graph or (has_other and len(item) != size)


def _are_owners(name: str, item: Tensor) -> bool:
    """Return whether an entry with such a name has whole numbers; Ultralytics has them in floats.

    Others with floats are a covariate of each item.
    """
    return is_integral(item) or (name == "batch_idx" and item.is_floating_point())


def _are_starts(name: str, item: Any, items: Mapping[str, Any], size: int, dim: int) -> bool:
    """Return whether an entry with such a name is where the rows of items begin."""
    if isinstance(item, (list, tuple)):  # of several tables
        return len(item) > 0 and all(map(is_line_of_integers, item))
    if not is_line_of_integers(item):
        return False
    if len(item) != size:
        return True
    # Of an item alone, such as the beginning of a clip, if nothing else may be what they number.
    others = {other: rows for other, rows in items.items() if other != name}
    return any(
        _may_be_entries(other, leaf, size, dim)
        or (_ENTRIES.search(other) is not None and is_line_of_integers(leaf))
        for other, rows in others.items()
        for leaf in find_leaves(rows)
    )


def _may_be_entries(name: str, value: Any, size: int, dim: int) -> bool:
    """Return whether a tensor may be the rows of all items: integers, or the points of clouds."""
    if not isinstance(value, Tensor) or value.is_nested or value.dim() not in (1, 2):
        return False
    is_longer = len(value) > size and find_dim(value, size, dim) is None
    return is_longer and (is_integral(value) or name == "coord")


def is_line_of_integers(value: Any) -> bool:
    """Return whether something is a tensor of integers with one dimension."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.dim() == 1
        and is_integral(value)
    )


def is_integral(tensor: Tensor) -> bool:
    """Return whether a tensor has whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _read_integers(part: Any, size: int) -> list[Tensor] | None:
    """Return one line of integers, or those of several tables; None for anything else.

    Several are a list, or the rows of a tensor that are not the items.
    """
    if isinstance(part, Tensor):
        is_table = not part.is_nested and part.dim() == 2 and len(part) not in (1, size)
        tensors = list(part) if is_table and is_integral(part) and can_read(part.device) else [part]
    else:
        tensors = list(part) if isinstance(part, (list, tuple)) else []
    is_read = all(is_line_of_integers(one) and can_read(one.device) for one in tensors)
    return tensors if is_read and tensors else None


def _begin_among(starts: Sequence[Tensor], rows: Sequence[Tensor], size: int) -> bool:
    """Return whether items begin at some places among rows, in one table or in each of several."""
    if len(starts) != len(rows) or not all(len(begin) in (size, size + 1) for begin in starts):
        return False
    pairs = list(zip(starts, rows, strict=True))
    if len(pairs) == 1:
        begin, entries = pairs[0]
        # As many as each other may be anything of the items, and fewer go up by chance.
        is_other = len(begin) >= _FEW and len(begin) != len(entries) and not _is_range(entries)
        last = len(entries) - (len(begin) == size)  # the end of all is one more than the items
        return is_other and _go_up(begin, 1) and int(begin[-1]) <= last
    is_one_each = all(len(begin) == len(entries) for begin, entries in pairs)
    if is_one_each and (len(pairs) * size < _MANY or not all(map(_is_range, starts))):
        return False
    return all(_go_up(begin, 0) and int(begin[-1]) <= len(entries) for begin, entries in pairs)


def _end_at(starts: Tensor, counts: Iterable[int]) -> bool:
    return _go_up(starts, 1) and int(starts[-1]) in counts


def _count_rows(parts: Iterable[Any], size: int) -> Iterator[int]:
    """Yield how many rows may be those of several items: all, or those of one row of tokens."""
    yield size
    for part in parts:
        if isinstance(part, Tensor) and not part.is_nested and part.dim() > 1 and len(part) == 1:
            yield part.shape[1]


def _go_up(starts: Tensor, step: int) -> bool:
    """Return whether numbers go up from 0, by a step or more, and do not just count.

    Those that count may be the numbers of the items, or positions.
    """
    if len(starts) < 2 or int(starts[0]) != 0 or bool((starts.diff() < step).any()):
        return False
    return step == 0 or not _is_range(starts)


def _is_range(numbers: Tensor) -> bool:
    return bool((numbers == torch.arange(len(numbers), device=numbers.device)).all())
