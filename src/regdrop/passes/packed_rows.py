"""Packed rows: several documents that are read as one row, told apart by further entries."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from regdrop.tracing import is_transformed

# Where each document begins in rows that are read as one, and the longest of them.
_STARTS = re.compile(r"(^|_)cu_?seq_?lens")
_LONGEST = re.compile(r"(^|_)max_(length_|seq_?len)")


def tell_documents(names: Iterable[Any]) -> bool:
    """Return whether one of the names is that of where documents begin."""
    return any(_is_named(name, _STARTS) for name in names)


def is_longest(name: Any) -> bool:
    """Return whether a name is that of the length of the longest document, the same in all rows."""
    return _is_named(name, _LONGEST)


def find_repetition(name: Any, item: Any, num_rows: int) -> Callable[[Tensor, int], Tensor] | None:
    """Return how an entry becomes that of rows several times; None if it is as any other.

    Args:
        name: Its name.
        item: The entry.
        num_rows: Rows of the batch.
    """
    if not isinstance(item, Tensor):
        return None
    if _is_named(name, _STARTS) and item.dim() == 1:
        return _repeat_starts
    if name == "seq_idx" and item.dim() > 0 and num_rows == len(item) == 1:
        return _repeat_numbers
    return None


def may_hide_documents(value: Mapping[Any, Any]) -> bool:
    """Return whether the tokens of one row may be those of several documents.

    Their positions alone would tell, which nobody has to wait for here.

    Args:
        value: The entries of a batch, by name.
    """
    words, positions = value.get("input_ids"), value.get("position_ids")
    return (
        isinstance(words, Tensor)
        and isinstance(positions, Tensor)
        and not (words.is_nested or positions.is_nested)
        and words.shape == positions.shape
        and len(words) == 1
        and value.get("attention_mask") is None
    )


def refuse_hidden_documents(value: Mapping[Any, Any], count_rows: Callable[[], int]) -> None:
    """Raise where documents in one row are told apart by their positions alone.

    Flash attention looks for them in one row; in several rows they attend from one to the other.

    Args:
        value: The entries of a batch, by name.
        count_rows: Returns how many rows there will be.
    """
    if (
        not may_hide_documents(value)
        or torch.compiler.is_compiling()
        or is_transformed()
        or count_rows() < 2
    ):
        return
    positions = value["position_ids"]
    if bool((positions.diff() < 1).any()):
        raise ValueError(
            "input_ids hold several documents in one row, which position_ids alone tell apart; "
            "flash attention finds them in one row only, stacked they would attend to each other; "
            'use passes="sequential", or a collator that returns cu_seq_lens, as '
            "DataCollatorWithFlattening(return_flash_attn_kwargs=True)"
        )


def _is_named(name: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(name, str) and pattern.search(name) is not None


def _repeat_starts(starts: Tensor, times: int) -> Tensor:
    """Return where documents begin, and the last one ends, of packed rows that follow each other.

    Args:
        starts: (documents + 1,), from 0 to the number of tokens.
        times: How often the rows appear.
    """
    return torch.cat([starts, *(starts[1:] + starts[-1] * i for i in range(1, times))])


def _repeat_numbers(numbers: Tensor, times: int) -> Tensor:
    """Return the number of every token's document, (times, tokens), counted on from row to row."""
    if not numbers.numel():
        return numbers.repeat(times, 1)
    rows = torch.arange(times, dtype=numbers.dtype, device=numbers.device)
    return numbers + rows[:, None] * (numbers.max() + 1)
