"""Batches whose tensors do not hold one row an item: they cannot be stacked."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regdrop.passes.packed_rows import (
    find_repetition,
    is_longest,
    may_hide_documents,
    tell_documents,
)
from regdrop.passes.places import are_shared_axes, find_place

# Read by all rows alike, in whatever number of rows they come; of packed rows, stacked by name.
_SHARED = frozenset({"cache_position", "head_mask", "cross_attn_head_mask", "decoder_head_mask"})
_BROADCAST = frozenset({"position_ids", "decoder_position_ids", "token_type_ids", "bbox"})


def why_not_stacked(inputs: Mapping[str, Any], rows: int) -> str | None:
    """Return why the passes of a batch have to run one after the other; None if they need not.

    Args:
        inputs: What the model is given.
        rows: Rows of the batch.
    """
    is_packed = tell_documents(inputs)
    if rows == 1 and not is_packed and may_hide_documents(inputs):
        # Attention kernels find the documents of one row by its positions, of several they do not.
        return "its one row may hold several documents, told apart by position_ids alone"
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or name in _SHARED:
            continue
        if are_shared_axes(name, value.shape, rows):
            continue
        if value.shape[0] == rows or (name in _BROADCAST and value.shape[0] == 1):
            continue
        is_stacked_by_name = (
            find_repetition(name, value, rows) is not None
            or find_place(name, value, rows, 0, lambda: True) is not None
        )
        if not is_stacked_by_name and not (is_packed and is_longest(name)):
            return f"{name} has {value.shape[0]} rows for {rows} rows of the batch"
    return None
