"""Batches whose tensors do not hold one row an item: they cannot be stacked."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Read by all rows alike, in whatever number of rows they come; of packed rows, stacked by name.
_SHARED = frozenset({"cache_position", "head_mask", "cross_attn_head_mask", "decoder_head_mask"})
_BROADCAST = frozenset({"position_ids", "decoder_position_ids", "token_type_ids", "bbox"})
_PACKED = re.compile(r"cu_seq_?lens|max_(length|seq_?len)|seq_idx")


def why_not_stacked(inputs: Mapping[str, Any], rows: int) -> str | None:
    """Return why the passes of a batch have to run one after the other; None if they need not.

    Args:
        inputs: What the model is given.
        rows: Rows of the batch.
    """
    is_packed = any(_PACKED.search(name) for name in inputs)
    if rows == 1 and not is_packed and _has_own_positions(inputs):
        # Attention kernels find the documents of one row by its positions, of several they do not.
        return "its one row may hold several documents, told apart by position_ids alone"
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or name in _SHARED:
            continue
        if value.shape[0] == rows or (name in _BROADCAST and value.shape[0] == 1):
            continue
        if not _PACKED.search(name):
            return f"{name} has {value.shape[0]} rows for {rows} rows of the batch"
    return None


def _has_own_positions(inputs: Mapping[str, Any]) -> bool:
    positions, words = inputs.get("position_ids"), inputs.get("input_ids")
    return (
        isinstance(positions, Tensor)
        and isinstance(words, Tensor)
        and positions.shape[-1] == words.shape[-1]
        and inputs.get("attention_mask") is None
    )
