"""What the losses over independent outputs share: labels of a multi-label head, regression."""

import torch
from torch import Tensor

from regdrop.kernels.gradient import limit_backward
from regdrop.loss.checks import check_floating, check_mask, check_stacked
from regdrop.loss.terms import ItemTerms


def split_passes(
    name: str, stacked: Tensor, target: Tensor, num_passes: int, backward_passes: int | None
) -> Tensor:
    """Return stacked outputs as (num_passes, *target.shape), in float32 at least."""
    check_floating(name, stacked)
    check_stacked(name, stacked, target, num_passes)
    if stacked.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"target must have the shape of one pass, "
            f"{(target.shape[0], *stacked.shape[1:])}, got {tuple(target.shape)}"
        )
    passes = stacked.reshape(num_passes, *target.shape)
    passes = passes if passes.dtype == torch.float64 else passes.float()
    return limit_backward(passes, num_passes if backward_passes is None else backward_passes)


def masked_terms(nll: Tensor, kl: Tensor, mask: Tensor | None, target: Tensor) -> ItemTerms:
    """Return the terms of every element, 0 and uncounted where the mask is False."""
    mask = check_mask(mask, target)
    if mask is None:
        count = torch.full((), nll.numel(), dtype=nll.dtype, device=nll.device)
    else:
        nll, kl = nll.masked_fill(~mask, 0), kl.masked_fill(~mask, 0)
        count = mask.sum()
    return ItemTerms(nll, kl, count, count)
