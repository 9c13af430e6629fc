"""What the losses over independent outputs share: labels of a multi-label head, regression."""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from regdrop.kernels.backward_passes import limit_backward
from regdrop.kernels.precision import mean_of_passes, widen
from regdrop.loss.checks import (
    check_counts,
    check_floating,
    check_mask,
    check_options,
    check_passes,
    check_plain,
    check_real,
    check_stacked,
)
from regdrop.loss.counts import ItemCounts
from regdrop.loss.output import RDropOutput, Reduction, Scale
from regdrop.loss.reduction import combine_terms
from regdrop.loss.terms import ItemTerms


def count_elements(target: Tensor, mask: Tensor | None = None) -> ItemCounts:
    """Return the number of elements that the mask leaves."""
    counted = check_mask(mask, target)
    if counted is None:
        count = torch.full((), target.numel(), device=target.device)
    else:
        count = counted.sum()
    return ItemCounts(count, count)


def terms_of_elements(
    name: str,
    stacked: Tensor,
    target: Tensor,
    *,
    num_passes: int,
    backward_passes: int | None,
    mask: Tensor | None,
    likelihood: Callable[[Tensor, Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> ItemTerms:
    """Return the terms of every element; where the mask is False they are 0, whatever is there.

    `likelihood` returns each pass's NLL of outputs (num_passes, batch, ...) and the target, both in
    float32 at least; `distance` is that of the outputs of two passes.
    """
    check_plain(name, stacked)
    check_plain("target", target)
    check_floating(name, stacked)
    check_passes(num_passes, backward_passes)
    check_stacked(name, stacked, target, num_passes)
    check_real("target", target)
    if stacked.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"target must have the shape of one pass, "
            f"{(target.shape[0], *stacked.shape[1:])}, got {tuple(target.shape)}"
        )
    counted = check_mask(mask, target)
    passes = limit_backward(widen(stacked.reshape(num_passes, *target.shape)), backward_passes)
    if counted is not None:
        passes, target = (x.masked_fill(~counted, 0) for x in (passes, target))
    nll = mean_of_passes(likelihood(passes, target.to(passes.dtype)))
    pairs = [distance(a, b) for a, b in combinations(passes, 2)]
    kl = torch.stack(pairs).mean(0) if pairs else torch.zeros_like(nll)
    if counted is not None:
        nll, kl = (term.masked_fill(~counted, 0) for term in (nll, kl))
    return ItemTerms(nll, kl, *count_elements(target, mask))


def loss_of_elements(
    terms: Callable[..., ItemTerms],
    stacked: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int,
    reduction: Reduction,
    num_items: Tensor | float | None,
    scale: Scale,
    backward_passes: int | None,
) -> RDropOutput:
    """Check the options of a loss over elements, and combine its terms, as the losses have it."""
    check_options(
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        scale=scale,
        backward_passes=backward_passes,
    )
    check_counts(reduction, num_items=num_items)
    return combine_terms(
        terms(stacked, target, num_passes=num_passes, backward_passes=backward_passes),
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        scale=scale,
        num_items=num_items,
    )
