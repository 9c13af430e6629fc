"""How many tokens a model has positions for, by its tables of positions."""

from typing import Any

from torch import nn


def position_limit(model: nn.Module) -> int | None:
    """Return the most tokens that a model has positions for; None where nothing limits them.

    Some keep the first rows of their table for themselves: two, as BART does, or those up to the
    padding word's, as RoBERTa does. Tables of distances, and those that grow, limit nothing.
    """
    limits = [
        module.num_embeddings - _rows_before(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _is_of_positions(name.rpartition(".")[2])
    ]
    return min(limits, default=None)


def _is_of_positions(name: str) -> bool:
    return name == "wpe" or ("position" in name and "relative" not in name)


def _rows_before(table: Any) -> int:
    offset = getattr(table, "offset", None)
    if offset is not None:
        return int(offset)
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1


def check_positions(model: nn.Module, tokens: int, setting: str, value: int) -> None:
    """Check that a model has positions for the tokens that it will read.

    Args:
        model: The model.
        tokens: Most tokens that it reads at once.
        setting: Name of the setting that they follow from.
        value: What it is.

    Raises:
        ValueError: If there are too few, by the setting.
    """
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{setting} must be at most {value - tokens + limit}: {type(model).__name__} has "
            f"positions for {limit} tokens; got {value}"
        )
