"""From the two terms of every item to one loss: shared by all output families."""

from typing import Literal

import torch
from torch import Tensor

from regdrop.loss.output import RDropOutput
from regdrop.loss.terms import ItemTerms

Reduction = Literal["mean", "sum", "none"]
Scale = Literal["sum", "mean"]


def combine_terms(
    terms: ItemTerms,
    *,
    alpha: float,
    num_passes: int,
    reduction: Reduction = "mean",
    scale: Scale = "sum",
    num_items: Tensor | float | None = None,
    num_weight: Tensor | float | None = None,
) -> RDropOutput:
    """Combine the terms of every item into the loss.

    Args:
        terms: Likelihood and divergence of the items, of any shape, and their counts.
        alpha: Weight of the divergence.
        num_passes: Number of passes.
        reduction: "mean", "sum" or "none".
        scale: "sum" for num_passes likelihoods plus alpha times the divergence, "mean" for
            that over num_passes.
        num_items: Replaces both denominators under "mean".
        num_weight: Replaces the likelihood's denominator under "mean"; defaults to num_items.

    Returns:
        The loss, and the two terms as detached means over valid items.
    """
    nll, kl = terms.nll, terms.kl
    nothing_counts = terms.kl_count == 0
    nll_count = torch.where(nothing_counts, 1, terms.nll_count).to(nll.dtype)
    kl_count = torch.where(nothing_counts, 1, terms.kl_count).to(kl.dtype)
    mean_nll = nll.detach().sum() / nll_count
    mean_kl = kl.detach().sum() / kl_count

    if reduction == "mean":
        if num_weight is None:
            num_weight = num_items
        nll = nll.sum() / (nll_count if num_weight is None else _positive(num_weight, nll))
        kl = kl.sum() / (kl_count if num_items is None else _positive(num_items, kl))
    elif reduction == "sum":
        nll, kl = nll.sum(), kl.sum()
    factor = num_passes if scale == "sum" else 1
    # Without alpha no gradient of the divergence is computed at all.
    loss = nll * factor if alpha == 0 else nll * factor + kl * (alpha * factor / num_passes)
    return RDropOutput(loss, mean_nll, mean_kl)


def _positive(count: Tensor | float, like: Tensor) -> Tensor:
    """Return the denominator as a tensor; an empty window counts as one item, its sum is 0."""
    count = torch.as_tensor(count, dtype=like.dtype, device=like.device)
    return torch.where(count == 0, 1, count)
