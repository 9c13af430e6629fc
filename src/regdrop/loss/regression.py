"""R-Drop for regression: the error of the predictions, and the same distance between two of them.

The paper's is the squared error (appendix A.4 of arXiv 2106.14448).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from regdrop.arguments import check_number
from regdrop.loss.checks import check_broadcastable
from regdrop.loss.counts import counted_by
from regdrop.loss.elementwise import count_elements, loss_of_elements, terms_of_elements
from regdrop.loss.module import RDropLoss
from regdrop.loss.output import RDropOutput, Reduction, Scale
from regdrop.loss.terms import ItemTerms


def rdrop_mse_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int = 2,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    scale: Scale = "mean",
    backward_passes: int | None = None,
) -> RDropOutput:
    """Compute the R-Drop loss of a regression by squared errors.

    It is the paper's (appendix A.4 of arXiv 2106.14448).

    Args:
        input: (num_passes * batch, ...), the predictions; pass 0 of the whole batch first.
        target: The original, unstacked target, (batch, ...). Every number is one: -100 marks
            nothing.
        alpha: Weight of the divergence, the paper's.
        num_passes: Number of passes that are stacked; 1, with alpha 0, is training without R-Drop.
        weight: Weight of each element's NLL, broadcastable to target.
        mask: Boolean, True where an element counts in both terms, broadcastable to target.
        reduction: "mean" over what counts, "sum", or "none" (one number an item). An element is an
            item, whatever its weight.
        num_items: Denominator of both terms under "mean" instead of the number that counts here: a
            total over an accumulation window and all ranks.
        scale: "mean" for a loss on the scale of training without R-Drop, "sum" for the paper's,
            which is `num_passes` times that.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.

    Returns:
        The loss and its two parts; `nll` is the error, `kl` the distance between passes.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range or shapes that do not fit.
    """
    return loss_of_elements(
        partial(mse_terms, weight=weight, mask=mask),
        input,
        target,
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        num_items=num_items,
        scale=scale,
        backward_passes=backward_passes,
    )


def rdrop_l1_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int = 2,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    scale: Scale = "mean",
    backward_passes: int | None = None,
) -> RDropOutput:
    """Compute the R-Drop loss of a regression by absolute errors.

    Args:
        input: (num_passes * batch, ...), the predictions; pass 0 of the whole batch first.
        target: The original, unstacked target, (batch, ...). Every number is one: -100 marks
            nothing.
        alpha: Weight of the divergence, the paper's.
        num_passes: Number of passes that are stacked; 1, with alpha 0, is training without R-Drop.
        weight: Weight of each element's NLL, broadcastable to target.
        mask: Boolean, True where an element counts in both terms, broadcastable to target.
        reduction: "mean" over what counts, "sum", or "none" (one number an item). An element is an
            item, whatever its weight.
        num_items: Denominator of both terms under "mean" instead of the number that counts here: a
            total over an accumulation window and all ranks.
        scale: "mean" for a loss on the scale of training without R-Drop, "sum" for the paper's,
            which is `num_passes` times that.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.

    Returns:
        As `rdrop_mse_loss`.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range or shapes that do not fit.
    """
    return loss_of_elements(
        partial(l1_terms, weight=weight, mask=mask),
        input,
        target,
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        num_items=num_items,
        scale=scale,
        backward_passes=backward_passes,
    )


def rdrop_smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int = 2,
    beta: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    scale: Scale = "mean",
    backward_passes: int | None = None,
) -> RDropOutput:
    """Compute the R-Drop loss of a regression by absolute errors that are squared near 0.

    Args:
        input: (num_passes * batch, ...), the predictions; pass 0 of the whole batch first.
        target: The original, unstacked target, (batch, ...). Every number is one: -100 marks
            nothing.
        alpha: Weight of the divergence, the paper's.
        num_passes: Number of passes that are stacked; 1, with alpha 0, is training without R-Drop.
        beta: Distance from which on it counts as such, less beta / 2; a smaller one d counts as
            `d^2 / (2 beta)`, as in `torch.nn.functional.smooth_l1_loss`. At least 0.
        weight: Weight of each element's NLL, broadcastable to target.
        mask: Boolean, True where an element counts in both terms, broadcastable to target.
        reduction: "mean" over what counts, "sum", or "none" (one number an item). An element is an
            item, whatever its weight.
        num_items: Denominator of both terms under "mean" instead of the number that counts here: a
            total over an accumulation window and all ranks.
        scale: "mean" for a loss on the scale of training without R-Drop, "sum" for the paper's,
            which is `num_passes` times that.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.

    Returns:
        As `rdrop_mse_loss`.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range or shapes that do not fit.
    """
    return loss_of_elements(
        partial(smooth_l1_terms, beta=beta, weight=weight, mask=mask),
        input,
        target,
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        num_items=num_items,
        scale=scale,
        backward_passes=backward_passes,
    )


@counted_by(count_elements, of_elements=("weight", "mask"))
def mse_terms(
    input: Tensor,
    target: Tensor,
    *,
    num_passes: int,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    backward_passes: int | None = None,
) -> ItemTerms:
    """Return the terms of every element, in the shape of the target.

    They are those of `rdrop_mse_loss`.

    Args:
        input: (num_passes * batch, ...), the predictions; pass 0 of the whole batch first.
        target: The original, unstacked target, (batch, ...).
        num_passes: Number of passes that are stacked; with 1 only the NLL is computed.
        weight: Weight of each element's NLL, broadcastable to target.
        mask: Boolean, True where an element counts in both terms, broadcastable to target.
        backward_passes: As in `rdrop_mse_loss`.

    Returns:
        The terms, float32 for half precision; 0 and uncounted where `mask` is False.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range or shapes that do not fit.
    """
    return _terms(F.mse_loss, input, target, num_passes, weight, mask, backward_passes)


@counted_by(count_elements, of_elements=("weight", "mask"))
def l1_terms(
    input: Tensor,
    target: Tensor,
    *,
    num_passes: int,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    backward_passes: int | None = None,
) -> ItemTerms:
    """Return the terms of every element, in the shape of the target.

    They are those of `rdrop_l1_loss`.

    Args:
        input: (num_passes * batch, ...), the predictions; pass 0 of the whole batch first.
        target: The original, unstacked target, (batch, ...).
        num_passes: Number of passes that are stacked; with 1 only the NLL is computed.
        weight: Weight of each element's NLL, broadcastable to target.
        mask: Boolean, True where an element counts in both terms, broadcastable to target.
        backward_passes: As in `rdrop_l1_loss`.

    Returns:
        The terms, float32 for half precision; 0 and uncounted where `mask` is False.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range or shapes that do not fit.
    """
    return _terms(F.l1_loss, input, target, num_passes, weight, mask, backward_passes)


@counted_by(count_elements, of_elements=("weight", "mask"))
def smooth_l1_terms(
    input: Tensor,
    target: Tensor,
    *,
    num_passes: int,
    beta: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    backward_passes: int | None = None,
) -> ItemTerms:
    """Return the terms of every element, in the shape of the target.

    They are those of `rdrop_smooth_l1_loss`.

    Args:
        input: (num_passes * batch, ...), the predictions; pass 0 of the whole batch first.
        target: The original, unstacked target, (batch, ...).
        num_passes: Number of passes that are stacked; with 1 only the NLL is computed.
        beta: As in `rdrop_smooth_l1_loss`.
        weight: Weight of each element's NLL, broadcastable to target.
        mask: Boolean, True where an element counts in both terms, broadcastable to target.
        backward_passes: As in `rdrop_smooth_l1_loss`.

    Returns:
        The terms, float32 for half precision; 0 and uncounted where `mask` is False.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range or shapes that do not fit.
    """
    check_number("beta", beta, low=0)
    distance = partial(F.smooth_l1_loss, beta=beta)
    return _terms(distance, input, target, num_passes, weight, mask, backward_passes)


def _terms(
    distance: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    num_passes: int,
    weight: Tensor | None,
    mask: Tensor | None,
    backward_passes: int | None,
) -> ItemTerms:
    def likelihood(passes: Tensor, target: Tensor) -> Tensor:
        check_broadcastable("weight", weight, target)
        nll = distance(passes, target.expand_as(passes), reduction="none")
        return nll if weight is None else nll * weight.to(nll.dtype)

    return terms_of_elements(
        "input",
        input,
        target,
        num_passes=num_passes,
        backward_passes=backward_passes,
        mask=mask,
        likelihood=likelihood,
        distance=partial(distance, reduction="none"),
    )


class _RegressionLoss(RDropLoss):
    """A loss of predictions as a module; a subclass says which by `_compute`."""

    _compute: Callable[..., RDropOutput]

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        num_items: Tensor | float | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> RDropOutput:
        """Return the loss of stacked `input` and the unstacked `target`."""
        return self._compute(
            input,
            target,
            alpha=self.alpha,
            num_passes=self.num_passes,
            weight=weight,
            mask=mask,
            reduction=self.reduction,
            num_items=num_items,
            scale=self.scale,
            backward_passes=self.backward_passes,
        )


class RDropMSELoss(_RegressionLoss):
    """`rdrop_mse_loss` as a module that holds the options; `alpha` may be changed at will."""

    _compute = staticmethod(rdrop_mse_loss)


class RDropL1Loss(_RegressionLoss):
    """`rdrop_l1_loss` as a module that holds the options; `alpha` may be changed at will."""

    _compute = staticmethod(rdrop_l1_loss)


class RDropSmoothL1Loss(_RegressionLoss):
    """`rdrop_smooth_l1_loss` as a module that holds the options; `alpha` may be changed at will."""

    def __init__(
        self,
        alpha: float,
        *,
        num_passes: int = 2,
        beta: float = 1.0,
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
        check_number("beta", beta, low=0)
        self.beta = beta

    def _compute(self, *tensors: Tensor, **options: Any) -> RDropOutput:
        return rdrop_smooth_l1_loss(*tensors, beta=self.beta, **options)
