"""R-Drop for several yes-or-no labels an item: binary cross entropy and the Bernoulli KL."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from regdrop.loss.checks import (
    check_broadcastable,
    check_chances,
    check_finite_divergence,
    check_real,
)
from regdrop.loss.counts import counted_by
from regdrop.loss.elementwise import count_elements, loss_of_elements, terms_of_elements
from regdrop.loss.module import RDropLoss
from regdrop.loss.output import RDropOutput, Reduction, Scale
from regdrop.loss.terms import ItemTerms


def rdrop_binary_cross_entropy_with_logits(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int = 2,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    scale: Scale = "mean",
    backward_passes: int | None = None,
) -> RDropOutput:
    """Compute the R-Drop loss of a multi-label classifier.

    The divergence of two passes with logits a and b is that of two Bernoulli distributions,
    `1/2 (sigmoid(a) - sigmoid(b)) (a - b)`, of each label by itself.

    Args:
        logits: (num_passes * batch, ...), floating point; pass 0 of the whole batch first.
        target: The original, unstacked target, (batch, ...), between 0 and 1 where `mask` and
            `weight` let it count.
        alpha: Weight of the divergence, the paper's.
        num_passes: Number of passes that are stacked; 1, with alpha 0, is training without R-Drop.
        weight: Weight of each element's NLL, broadcastable to target.
        pos_weight: Weight of positive labels in the NLL, broadcastable to target.
        mask: Boolean, True where an element counts in both terms, broadcastable to target.
        reduction: "mean" over what counts, "sum", or "none" (one number an item). An element is an
            item.
        num_items: Denominator of both terms under "mean" instead of the number that counts here: a
            total over an accumulation window and all ranks.
        scale: "mean" for a loss on the scale of training without R-Drop, "sum" for the paper's,
            which is `num_passes` times that.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.

    Returns:
        The loss and its two parts, float32 for half-precision logits.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range, shapes that do not fit or labels that are no chances
            (on a GPU an assertion there).
    """
    return loss_of_elements(
        partial(binary_cross_entropy_terms, weight=weight, pos_weight=pos_weight, mask=mask),
        logits,
        target,
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        num_items=num_items,
        scale=scale,
        backward_passes=backward_passes,
    )


@counted_by(count_elements, of_elements=("weight", "pos_weight", "mask"))
def binary_cross_entropy_terms(
    logits: Tensor,
    target: Tensor,
    *,
    num_passes: int,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    backward_passes: int | None = None,
) -> ItemTerms:
    """Return the terms of every element, in the shape of the target.

    They are those of `rdrop_binary_cross_entropy_with_logits`.

    Args:
        logits: (num_passes * batch, ...), floating point; pass 0 of the whole batch first.
        target: The original, unstacked target, (batch, ...), between 0 and 1 where `mask` and
            `weight` let it count.
        num_passes: Number of passes that are stacked; with 1 only the NLL is computed.
        weight: Weight of each element's NLL, broadcastable to target.
        pos_weight: Weight of positive labels in the NLL, broadcastable to target.
        mask: Boolean, True where an element counts in both terms, broadcastable to target.
        backward_passes: As in `rdrop_binary_cross_entropy_with_logits`.

    Returns:
        The terms, float32 for half precision; 0 and uncounted where `mask` is False.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range, shapes that do not fit or labels that are no chances
            (on a GPU an assertion there).
    """
    terms = terms_of_elements(
        "logits",
        logits,
        target,
        num_passes=num_passes,
        backward_passes=backward_passes,
        mask=mask,
        likelihood=partial(_likelihood, weight=weight, pos_weight=pos_weight),
        distance=_bernoulli_kl,
    )
    if num_passes > 1:
        check_finite_divergence(terms.kl)
    return terms


def _likelihood(
    passes: Tensor, target: Tensor, *, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    check_broadcastable("weight", weight, target)
    check_broadcastable("pos_weight", pos_weight, target)
    if weight is not None:  # a label of no weight may be anything
        target = target.masked_fill(weight == 0, 0)
    check_chances(target)
    limits = torch.finfo(passes.dtype)
    return F.binary_cross_entropy_with_logits(
        # A label that is masked by an infinity, and is not there, costs nothing.
        passes.clamp(limits.min, limits.max),
        target.expand_as(passes),
        weight=None if weight is None else weight.to(passes.dtype),
        pos_weight=None if pos_weight is None else pos_weight.to(passes.dtype),
        reduction="none",
    )


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    # A label masked with the same infinity in both passes contributes nothing.
    difference = (a - b).masked_fill((a == b) & torch.isinf(a), 0)
    return (a.sigmoid() - b.sigmoid()) * difference / 2


class RDropBCEWithLogitsLoss(RDropLoss):
    """`rdrop_binary_cross_entropy_with_logits` as a module that holds the options."""

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        alpha: float,
        *,
        num_passes: int = 2,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: Reduction = "mean",
        scale: Scale = "mean",
        backward_passes: int | None = None,
    ) -> None:
        super().__init__(
            alpha,
            num_passes=num_passes,
            reduction=reduction,
            scale=scale,
            backward_passes=backward_passes,
        )
        check_real("weight", weight)
        check_real("pos_weight", pos_weight)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        num_items: Tensor | float | None = None,
        mask: Tensor | None = None,
    ) -> RDropOutput:
        """Return the loss of stacked `logits` and the unstacked `target`."""
        return rdrop_binary_cross_entropy_with_logits(
            logits,
            target,
            alpha=self.alpha,
            num_passes=self.num_passes,
            weight=self.weight,
            pos_weight=self.pos_weight,
            mask=mask,
            reduction=self.reduction,
            num_items=num_items,
            scale=self.scale,
            backward_passes=self.backward_passes,
        )
