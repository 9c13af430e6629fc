"""Tensors whose values tell of other rows of the batch: which are near, or how many are one's.

Names alone would refuse features of the items that are called alike, so the values are read too.
Numbers of rows stacked would be those of the first pass again; of rows that only one pass has,
there would be too few. No error shows either.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regdrop.passes.items import find_dim
from regdrop.passes.numbered_rows import WAYS_OUT, is_integral, is_line_of_integers
from regdrop.passes.places import can_wait
from regdrop.passes.structures import find_leaves

_NUMBERS = re.compile(
    r"(^|_)(neighbou?rs?|(neighbou?rs?|knn|nn|parent|anchor|positive|neg(ative)?|pair)s?_"
    r"(idx|ind|index|indices))$"
)
_GROUPS = re.compile(r"(^|_)(segment|graph|cloud)_(ids?|idx|index)$")
_LENGTHS = re.compile(r"(^|_)(lengths?|lens|seq_?lens|num_(nodes|atoms|points|tokens|words))$")
# What a loss reads from the caller's own batch, not from the stacked one.
_TARGETS = re.compile(r"target|label|tgt|answer|decoder")
# Labels of a few items may look like numbers of rows by chance.
_FEW = 4

_ITEMS = (
    "numbers other items of the batch: those of each pass would be read from the first; count it "
    "on from pass to pass (torch.cat([numbers, numbers + len(x)]))"
)
_OWNERS = (
    "numbers the group of every row, one after the other: those of all passes would be one; count "
    "it on from pass to pass"
)
_PARTS = (
    "tells how many rows each item has in {}, which has as many in all: one of the two would not "
    "be repeated; pad the rows to (batch, length)"
)


def refuse_item_numbers(
    value: Mapping[Any, Any], size: int, dim: int, is_whole: Callable[[], bool]
) -> None:
    """Raise for numbers of items, and of rows of each, that are told by names and values.

    Args:
        value: The entries of a batch, by name.
        size: Number of items.
        dim: Their dimension in tensors.
        is_whole: Returns whether the items stay as they are, so that nothing has to be counted on.

    Raises:
        ValueError: For such an entry, by its name.
    """
    for name, item in value.items():
        if not isinstance(name, str) or not isinstance(item, Tensor) or item.is_nested:
            continue
        if _NUMBERS.search(name):
            meaning = _ITEMS if _are_numbers_of_items(item, value, size) else None
        elif _GROUPS.search(name):
            meaning = _OWNERS if _are_groups_in_order(item, size) else None
        elif _LENGTHS.search(name):
            rows = _find_rows(name, item, value, size, dim)
            meaning = None if rows is None else _PARTS.format(rows)
        else:
            continue
        if meaning is not None and not is_whole():
            ways_out = WAYS_OUT.format("another name")
            raise ValueError(f"batch holds {name}, which {meaning}{ways_out}")


def _are_numbers_of_items(item: Tensor, value: Mapping[Any, Any], size: int) -> bool:
    """Return whether values are numbers of items, or -1 for none, and not of an item's steps."""
    if not item.dim() or not item.numel() or size < _FEW or not is_integral(item):
        return False
    if not can_wait(item):
        return False
    low, high = torch.stack([*item.aminmax()]).tolist()
    return (
        low >= -1
        and 1 < high < size
        and not any(_has_steps(leaf, high) for leaf in find_leaves(dict(value)) if leaf is not item)
    )


def _has_steps(leaf: Any, last: int) -> bool:
    """Return whether each item may have steps, or points, up to the number of one."""
    if not isinstance(leaf, Tensor) or leaf.is_nested or leaf.dim() < 2:
        return False
    return (leaf.dim() > 2 or is_integral(leaf)) and leaf.shape[1] > last


def _are_groups_in_order(item: Tensor, size: int) -> bool:
    """Return whether rows are numbered by groups: from 0 up, each group in one piece."""
    if not is_line_of_integers(item) or len(item) != size or size < _FEW or not can_wait(item):
        return False
    steps = item.diff()
    is_told = (item[0] == 0) & (steps >= 0).all() & (steps <= 1).all() & (steps == 1).any()
    return bool(is_told & (steps == 0).any())  # else it may be the number of the item


def _find_rows(
    name: str, item: Tensor, value: Mapping[Any, Any], size: int, dim: int
) -> str | None:
    """Return the name of what has as many rows as the items together; None if nothing has."""
    if not is_line_of_integers(item) or len(item) < 2 or _TARGETS.search(name):
        return None
    longer = {
        other: [len(leaf) for leaf in find_leaves(rows) if _is_longer(leaf, len(item), size, dim)]
        for other, rows in value.items()
        if isinstance(other, str) and other != name and not _TARGETS.search(other)
    }
    if not any(longer.values()) or not can_wait(item):
        return None
    total = int(item.sum())
    return next((other for other, rows in longer.items() if total in rows), None)


def _is_longer(leaf: Any, count: int, size: int, dim: int) -> bool:
    """Return whether a tensor has more rows than there are lengths, which are not time steps."""
    if not isinstance(leaf, Tensor) or leaf.is_nested or leaf.dim() == 0 or len(leaf) <= count:
        return False
    return not dim or find_dim(leaf, size, dim) is None
