"""R-Drop for regression: squared error and the squared difference of two predictions."""

from itertools import combinations

import torch
from torch import Tensor

from regdrop.loss.checks import check_counts, check_mask, check_options
from regdrop.loss.counts import counted_by
from regdrop.loss.elementwise import count_elements, masked_terms, split_passes
from regdrop.loss.module import RDropLoss
from regdrop.loss.output import RDropOutput
from regdrop.loss.reduction import Reduction, Scale, combine_terms
from regdrop.loss.terms import ItemTerms


def rdrop_mse_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int = 2,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    scale: Scale = "sum",
    backward_passes: int | None = None,
) -> RDropOutput:
    """Compute the R-Drop loss of a regression (appendix A.4 of arXiv 2106.14448).

    Args:
        input: (num_passes * batch, ...), the predictions; pass 0 of the whole batch first.
        target: The original, unstacked target, (batch, ...).
        alpha: Weight of the squared difference between passes.
        num_passes: Number of passes in `input`; 1 only with alpha 0.
        mask: Boolean, True where an element counts in both terms, broadcastable to target.
        reduction: "mean" over unmasked elements, "sum", or "none" (one number an element).
        num_items: Denominator of both terms under "mean", in elements.
        scale: "sum" or "mean", as in `rdrop_cross_entropy`.
        backward_passes: As in `rdrop_cross_entropy`.

    Returns:
        The loss and its two parts; `nll` is the squared error, `kl` the squared difference.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range or shapes that do not fit.
    """
    check_options(
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        scale=scale,
        backward_passes=backward_passes,
    )
    check_counts(reduction, num_items=num_items)
    terms = mse_terms(
        input, target, num_passes=num_passes, mask=mask, backward_passes=backward_passes
    )
    return combine_terms(
        terms,
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        scale=scale,
        num_items=num_items,
    )


@counted_by(count_elements)
def mse_terms(
    input: Tensor,
    target: Tensor,
    *,
    num_passes: int,
    mask: Tensor | None = None,
    backward_passes: int | None = None,
) -> ItemTerms:
    """Return the terms of every element, in the shape of the target; see above."""
    passes = split_passes("input", input, target, num_passes, backward_passes)
    counted = check_mask(mask, target)
    if counted is not None:
        # Masked elements may hold anything, a nan included.
        passes = passes.masked_fill(~counted, 0)
        target = target.masked_fill(~counted, 0)
    nll = (passes - target.to(passes.dtype)).square().mean(0)
    pairs = [(a - b).square() for a, b in combinations(passes, 2)]
    kl = torch.stack(pairs).mean(0) if pairs else torch.zeros_like(nll)
    return masked_terms(nll, kl, mask, target)


class RDropMSELoss(RDropLoss):
    """`rdrop_mse_loss` as a module that holds the options; `alpha` may be changed at will."""

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        num_items: Tensor | float | None = None,
        mask: Tensor | None = None,
    ) -> RDropOutput:
        """Return the loss of stacked `input` and the unstacked `target`."""
        return rdrop_mse_loss(
            input,
            target,
            alpha=self.alpha,
            num_passes=self.num_passes,
            mask=mask,
            reduction=self.reduction,
            num_items=num_items,
            scale=self.scale,
            backward_passes=self.backward_passes,
        )
