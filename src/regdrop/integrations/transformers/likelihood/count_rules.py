"""How terms of one's own count their items: one of a few rules, which the first batch tells."""

from collections.abc import Callable

import torch
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.loss import ItemCounts, ItemTerms
from regdrop.loss.elementwise import count_elements


def _count_labels(target: Tensor) -> ItemCounts:
    count = target.ne(IGNORE_INDEX).sum()
    return ItemCounts(count, count)


def _count_rows(target: Tensor) -> ItemCounts:
    count = torch.full((), target.shape[0], device=target.device)
    return ItemCounts(count, count)


# By a name, which one process can tell the others.
COUNT_RULES: dict[str, Callable[[Tensor], ItemCounts]] = {
    "labels": _count_labels,
    "rows": _count_rows,
    "numbers": count_elements,
}


def find_count_rule(target: Tensor, terms: ItemTerms) -> str:
    """Return the name of the first rule that gives the counts of some terms.

    Args:
        target: The target of a head, of one batch.
        terms: The head's terms of that batch.

    Raises:
        ValueError: If there is none.
    """
    nll_count, kl_count = terms.nll_count.item(), terms.kl_count.item()
    for name, count in COUNT_RULES.items():
        if int(count(target).kl) == int(kl_count) == nll_count:
            return name
    raise ValueError(
        f"count must be given for the Head of rdrop_head: its terms count {nll_count:g} and "
        f"{kl_count:g} items for a target of shape {tuple(target.shape)}, which is neither its "
        "labels other than -100, its rows nor all of its numbers. Give a function from the target "
        "to regdrop.loss.ItemCounts"
    )
