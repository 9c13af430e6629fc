"""R-Drop for one class an item: cross entropy and the KL between softmax outputs."""

import math

import torch
from torch import Tensor

from regdrop.kernels import Implementation, Target, rdrop_terms
from regdrop.loss.checks import (
    check_classes,
    check_counts,
    check_finite_divergence,
    check_floating,
    check_label_smoothing,
    check_options,
    check_own_memory,
    check_stacked,
)
from regdrop.loss.counts import ItemCounts, counted_by
from regdrop.loss.module import RDropLoss
from regdrop.loss.output import RDropOutput
from regdrop.loss.reduction import Reduction, Scale, combine_terms
from regdrop.loss.terms import ItemTerms


def rdrop_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int = 2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    num_weight: Tensor | float | None = None,
    scale: Scale = "sum",
    backward_passes: int | None = None,
    inplace: bool = False,
    impl: Implementation = "auto",
) -> RDropOutput:
    """Compute the R-Drop loss of a classifier (equation 4 of arXiv 2106.14448).

    Args:
        logits: (num_passes * batch, ..., C), float16, bfloat16, float32 or float64; pass 0 of the
            whole batch first, then pass 1 (the layout of `repeat_batch`). Half precision is
            computed in float32.
        target: The original, unstacked target: class indices (batch, ...), int64, or class
            probabilities (batch, ..., C).
        alpha: Weight of the divergence, the paper's.
        num_passes: Number of passes in `logits`; 1 with alpha 0 is plain cross entropy.
        weight: (C,) weight of each class in the likelihood, as in torch's cross entropy.
        ignore_index: Index that marks an item that counts in neither term.
        label_smoothing: Smoothing of the likelihood's target; the KL compares raw outputs.
        reduction: "mean" over valid items, "sum", or "none" (one number an item).
        num_items: Denominator of both terms under "mean" instead of the number of valid items:
            a total over an accumulation window and all ranks.
        num_weight: Denominator of the likelihood alone under "mean", for class weights: the
            total weight of the same items. Defaults to `num_items`.
        scale: "sum" for the paper's `num_passes * nll + alpha * kl`, "mean" for that over
            num_passes, on the scale of training without R-Drop.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.
        inplace: Let the gradient overwrite `logits` in the backward, which saves their memory. A
            layer whose own backward needs its output raises.
        impl: "auto", or how to compute it: "eager", "chunked", "compiled", "cpp" or "triton"
            (docs/performance.md).

    Returns:
        The loss and its two parts, float32 for half-precision logits.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range, shapes that do not fit, targets out of range (on
            the CPU), or a class masked with -inf in one pass only.
    """
    check_options(
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        scale=scale,
        backward_passes=backward_passes,
        label_smoothing=label_smoothing,
    )
    check_counts(reduction, num_items=num_items, num_weight=num_weight)
    terms = cross_entropy_terms(
        logits,
        target,
        num_passes=num_passes,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        backward_passes=backward_passes,
        inplace=inplace,
        impl=impl,
    )
    return combine_terms(
        terms,
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        scale=scale,
        num_items=num_items,
        num_weight=num_weight,
    )


def count_classes(
    target: Tensor, weight: Tensor | None = None, ignore_index: int = -100
) -> ItemCounts:
    """Return the number of items that count, and their number or class weight in the likelihood."""
    if target.is_floating_point():
        count = torch.full((), math.prod(target.shape[:-1]), device=target.device)
        return ItemCounts(count, count)
    classes = target.long()
    valid = classes != ignore_index
    count = valid.sum()
    if weight is None:
        return ItemCounts(count, count)
    weights = weight.detach()[torch.where(valid, classes, 0)] * valid
    # In double, which not every device has, so that the count is right for logits in double.
    dtype = torch.float32 if weights.device.type == "mps" else torch.float64
    return ItemCounts(weights.sum(dtype=dtype), count)


@counted_by(count_classes)
def cross_entropy_terms(
    logits: Tensor,
    target: Tensor,
    *,
    num_passes: int,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    backward_passes: int | None = None,
    inplace: bool = False,
    impl: Implementation = "auto",
) -> ItemTerms:
    """Return the terms of every item, in the shape of the class indices; see above."""
    items = _check(logits, target, num_passes, weight)
    num_classes = logits.shape[-1]
    if inplace:
        check_own_memory("logits", logits)
    bundle = _bundle(target, items, num_classes, weight, ignore_index, label_smoothing)
    num_items = items.numel()
    nll, kl = rdrop_terms(
        logits.reshape(num_passes, num_items, num_classes),
        bundle,
        backward_passes=num_passes if backward_passes is None else backward_passes,
        inplace=inplace,
        impl=impl,
    )
    if num_passes > 1:
        check_finite_divergence(kl)
    counts = count_classes(target, weight, ignore_index)
    return ItemTerms(nll.view(items.shape), kl.view(items.shape), *counts)


def _bundle(
    target: Tensor,
    items: Tensor,
    num_classes: int,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Target:
    if target.is_floating_point():
        return Target(None, target.reshape(-1, num_classes), weight, label_smoothing, None)
    index = items.reshape(-1).long()
    valid = index != ignore_index
    index = torch.where(valid, index, 0)
    check_classes(index, num_classes, ignore_index)
    return Target(index, None, weight, label_smoothing, valid)


def _check(logits: Tensor, target: Tensor, num_passes: int, weight: Tensor | None) -> Tensor:
    """Return a tensor of the items' shape, the target itself when it holds class indices."""
    check_floating("logits", logits)
    check_stacked("logits", logits, target, num_passes)
    if logits.dim() < 2:
        raise ValueError(
            f"logits must be (num_passes * batch, ..., classes), got shape {tuple(logits.shape)}"
        )
    if target.is_floating_point():
        if target.shape[1:] != logits.shape[1:]:
            raise ValueError(
                f"target of class probabilities must have the shape of one pass, "
                f"{(target.shape[0], *logits.shape[1:])}, got {tuple(target.shape)}"
            )
        items = target[..., 0]
    elif target.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        if target.shape[1:] != logits.shape[1:-1]:
            raise ValueError(
                f"target of class indices must have the shape of one pass without the classes, "
                f"{(target.shape[0], *logits.shape[1:-1])}, got {tuple(target.shape)} for logits "
                f"{tuple(logits.shape)}; classes are the last dimension of logits"
            )
        items = target
    else:
        raise TypeError(f"target must hold integers or probabilities, got {target.dtype}")
    if weight is not None and tuple(weight.shape) != (logits.shape[-1],):
        raise ValueError(
            f"weight must have one entry a class, shape ({logits.shape[-1]},), "
            f"got {tuple(weight.shape)}"
        )
    return items


class RDropCrossEntropyLoss(RDropLoss):
    """`rdrop_cross_entropy` as a module that holds the options; `alpha` may be changed at will."""

    weight: Tensor | None

    def __init__(
        self,
        alpha: float,
        *,
        num_passes: int = 2,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        scale: Scale = "sum",
        backward_passes: int | None = None,
        inplace: bool = False,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__(
            alpha,
            num_passes=num_passes,
            reduction=reduction,
            scale=scale,
            backward_passes=backward_passes,
        )
        check_label_smoothing(label_smoothing)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.inplace = inplace
        self.impl: Implementation = impl

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        num_items: Tensor | float | None = None,
        num_weight: Tensor | float | None = None,
    ) -> RDropOutput:
        """Return the loss of stacked `logits` and the unstacked `target`."""
        return rdrop_cross_entropy(
            logits,
            target,
            alpha=self.alpha,
            num_passes=self.num_passes,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            num_items=num_items,
            num_weight=num_weight,
            scale=self.scale,
            backward_passes=self.backward_passes,
            inplace=self.inplace,
            impl=self.impl,
        )
