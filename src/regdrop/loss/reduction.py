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
    nll_count, kl_count = positive_counts(terms.nll_count, terms.kl_count, nll.dtype)
    total_nll, total_kl = nll.sum(), kl.sum()
    mean_nll, mean_kl = total_nll.detach() / nll_count, total_kl.detach() / kl_count

    if reduction == "mean":
        nll_count, kl_count = denominators(nll_count, kl_count, num_items, num_weight)
        nll, kl = total_nll / nll_count, total_kl / kl_count
    elif reduction == "sum":
        nll, kl = total_nll, total_kl
    nll_weight, kl_weight = term_weights(alpha, num_passes, scale)
    # Without alpha no gradient of the divergence is computed at all.
    loss = nll * nll_weight if alpha == 0 else nll * nll_weight + kl * kl_weight
    return RDropOutput(loss, mean_nll, mean_kl)


def term_weights(alpha: float, num_passes: int, scale: Scale) -> tuple[float, float]:
    """Return the weights of the likelihood and of the divergence in the loss."""
    factor = num_passes if scale == "sum" else 1
    return factor, alpha * factor / num_passes


def positive_counts(
    nll_count: Tensor, kl_count: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return both terms' counts; where nothing counts in a term it is 1, for a sum that is 0."""
    return (
        torch.where(nll_count == 0, 1, nll_count).to(dtype),
        torch.where(kl_count == 0, 1, kl_count).to(dtype),
    )


def denominators(
    nll_count: Tensor,
    kl_count: Tensor,
    num_items: Tensor | float | None,
    num_weight: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """Return what both sums are divided by under "mean": the counts, or what replaces them."""
    if num_weight is None:
        num_weight = num_items
    return (
        nll_count if num_weight is None else _positive(num_weight, nll_count),
        kl_count if num_items is None else _positive(num_items, kl_count),
    )


def _positive(count: Tensor | float, like: Tensor) -> Tensor:
    """Return the denominator as a tensor; an empty window counts as one item, its sum is 0."""
    count = torch.as_tensor(count, dtype=like.dtype, device=like.device)
    return torch.where(count == 0, 1, count)
