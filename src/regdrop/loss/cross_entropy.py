"""R-Drop for one class an item: cross entropy and the KL between softmax outputs."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.kernels import Implementation, Target, rdrop_sum, rdrop_terms, whole_loss
from regdrop.loss.checks import (
    LARGEST_DIVERGENCE,
    all_are_classes,
    check_class_dim,
    check_classes,
    check_counts,
    check_finite_divergence,
    check_floating,
    check_label_smoothing,
    check_options,
    check_own_memory,
    check_stacked,
    check_sums,
    check_unlabelled_index,
)
from regdrop.loss.counts import ItemCounts, counted_by
from regdrop.loss.module import RDropLoss
from regdrop.loss.output import RDropOutput
from regdrop.loss.reduction import Reduction, Scale, combine_terms, reduce_sums, term_weights
from regdrop.loss.terms import ItemTerms


def rdrop_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    num_passes: int = 2,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    unlabelled_index: int | None = None,
    class_dim: int = -1,
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
            probabilities (batch, ..., C), with the classes where those of `logits` are.
        alpha: Weight of the divergence, the paper's.
        num_passes: Number of passes in `logits`; 1 with alpha 0 is plain cross entropy.
        weight: (C,) weight of each class in the likelihood, as in torch's cross entropy.
        ignore_index: Index that marks an item that counts in neither term.
        unlabelled_index: Index that marks an item without a label, which counts in the divergence
            alone: the likelihood is a mean over the labelled items, the divergence over all that
            are not ignored. Any number but a class and `ignore_index`. None: no item is.
        class_dim: Dimension of the classes in `logits`; 1 for torch's own layout, (batch, C, ...).
            Where other dimensions have as many elements as there are classes, no check can tell
            a wrong one.
        label_smoothing: Smoothing of the likelihood's target; the KL compares raw outputs.
        reduction: "mean" over valid items, "sum", or "none" (one number an item).
        num_items: Denominator of both terms under "mean" instead of the number of valid items:
            a total over an accumulation window and all ranks. Above 0; a tensor may be 0, the
            count of a window in which nothing counts.
        num_weight: Denominator of the likelihood alone under "mean", for class weights or
            unlabelled items: the total weight, or number, of the labelled ones. Defaults to
            `num_items`.
        scale: "sum" for the paper's `num_passes * nll + alpha * kl`, "mean" for that over
            num_passes, on the scale of training without R-Drop.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.
        inplace: Let the gradient overwrite `logits` in the backward, which saves their memory. A
            layer whose own backward needs its output raises. Logits that have to be copied to
            have their classes last, as (batch, C, ...) have, are overwritten in the copy.
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
    if impl == "cpp" and class_dim == -1 and unlabelled_index is num_items is num_weight is None:
        output = _whole(
            logits,
            target,
            weight,
            alpha=alpha,
            num_passes=num_passes,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            scale=scale,
            backward_passes=backward_passes,
            inplace=inplace,
        )
        if output is not None:
            return output
    items = _items(
        logits,
        target,
        num_passes=num_passes,
        weight=weight,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        class_dim=class_dim,
        label_smoothing=label_smoothing,
        inplace=inplace,
    )
    options: dict[str, Any] = {
        "backward_passes": num_passes if backward_passes is None else backward_passes,
        "inplace": inplace,
        "impl": impl,
    }
    if reduction == "none" or items.labelled is not None:
        return combine_terms(
            _terms(items, **options),
            alpha=alpha,
            num_passes=num_passes,
            reduction=reduction,
            scale=scale,
            num_items=num_items,
            num_weight=num_weight,
        )
    output = reduce_sums(
        partial(rdrop_sum, items.logits, items.target, **options),
        *items.counts(),
        torch.float64 if logits.dtype == torch.float64 else torch.float32,
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        scale=scale,
        num_items=num_items,
        num_weight=num_weight,
    )
    if num_passes > 1:
        check_finite_divergence(output.kl)
    return output


def _whole(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    alpha: float,
    num_passes: int,
    ignore_index: int,
    label_smoothing: float,
    reduction: Reduction,
    scale: Scale,
    backward_passes: int | None,
    inplace: bool,
) -> RDropOutput | None:
    """Return the loss by one operation of the C++ kernel, or None where that does not apply.

    Small logits then cost little more than the call.
    """
    _check(logits, target, num_passes, weight, -1)
    if reduction == "none" or target.is_floating_point():
        return None
    nll_weight, kl_weight = term_weights(alpha, num_passes, scale)
    found = whole_loss(
        logits,
        target,
        weight,
        impl="cpp",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        nll_weight=nll_weight,
        kl_weight=kl_weight if alpha else None,
        is_mean=reduction == "mean",
        num_passes=num_passes,
        backward_passes=backward_passes or num_passes,
        inplace=inplace,
        largest_divergence=LARGEST_DIVERGENCE,
    )
    return None if found is None else RDropOutput(*found)


def count_classes(
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    unlabelled_index: int | None = None,
    class_dim: int = -1,
) -> ItemCounts:
    """Return the number of items that count, and their number or class weight in the likelihood."""
    if target.is_floating_point():
        count = torch.full((), math.prod(_without(target.shape, class_dim)), device=target.device)
        return ItemCounts(count, count)
    check_unlabelled_index(unlabelled_index, ignore_index)
    classes = target.long()
    valid = classes != ignore_index
    count = valid.sum()
    labelled = valid if unlabelled_index is None else valid & (classes != unlabelled_index)
    if weight is None:
        return ItemCounts(count if unlabelled_index is None else labelled.sum(), count)
    weights = weight.detach()[torch.where(labelled, classes, 0)] * labelled
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
    ignore_index: int = IGNORE_INDEX,
    unlabelled_index: int | None = None,
    class_dim: int = -1,
    label_smoothing: float = 0.0,
    backward_passes: int | None = None,
    inplace: bool = False,
    impl: Implementation = "auto",
) -> ItemTerms:
    """Return the terms of every item, in the shape of the class indices; see above."""
    items = _items(
        logits,
        target,
        num_passes=num_passes,
        weight=weight,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        class_dim=class_dim,
        label_smoothing=label_smoothing,
        inplace=inplace,
    )
    return _terms(
        items,
        backward_passes=num_passes if backward_passes is None else backward_passes,
        inplace=inplace,
        impl=impl,
    )


class _Items(NamedTuple):
    """The arguments, checked, in the form that kernels take."""

    logits: Tensor  # (num_passes, N, C)
    target: Target
    shape: tuple[int, ...]  # of the items
    labelled: Tensor | None  # (N,), where they count in the likelihood; None: all that count do
    num_valid: int | Tensor  # a number wherever it is known without waiting for a device
    count_all: Callable[[], ItemCounts]

    def counts(self) -> tuple[int | Tensor, int | Tensor]:
        """Return the denominators of both terms, numbers where they are known."""
        if self.target.classes is None or (self.target.weight is None and self.labelled is None):
            return self.num_valid, self.num_valid
        return self.count_all().nll, self.num_valid


def _items(
    logits: Tensor,
    target: Tensor,
    *,
    num_passes: int,
    weight: Tensor | None,
    ignore_index: int,
    unlabelled_index: int | None,
    class_dim: int,
    label_smoothing: float,
    inplace: bool,
) -> _Items:
    """Check the arguments and bring them into the form that kernels take."""
    shape = _check(logits, target, num_passes, weight, class_dim)
    if inplace:
        check_own_memory("logits", logits)
    if class_dim not in (-1, logits.dim() - 1):
        logits = logits.movedim(class_dim, -1)
    num_items, num_classes = math.prod(shape), logits.shape[-1]
    labelled: Tensor | None = None
    num_valid: int | Tensor = num_items
    if target.is_floating_point():
        if unlabelled_index is not None:
            raise ValueError(
                f"unlabelled_index needs class indices, got unlabelled_index={unlabelled_index} "
                f"and class probabilities; mark items of an indexed target, or leave it out"
            )
        check_sums(target, class_dim)
        probabilities = target.movedim(class_dim, -1).reshape(num_items, num_classes)
        bundle = Target(None, probabilities, weight, label_smoothing, None)
    else:
        check_unlabelled_index(unlabelled_index, ignore_index, num_classes)
        classes = target if target.dim() == 1 else target.reshape(-1)
        classes = classes if classes.dtype == torch.int64 else classes.long()
        valid = None
        if unlabelled_index is not None or not all_are_classes(classes, num_classes, ignore_index):
            valid = classes != ignore_index
            counted = valid
            if unlabelled_index is not None:
                labelled = classes != unlabelled_index
                counted = valid & labelled
            classes = torch.where(counted, classes, 0)
            check_classes(classes, num_classes, ignore_index, unlabelled_index)
            num_valid = valid.sum()
        bundle = Target(classes, None, weight, label_smoothing, valid)
    return _Items(
        # Seldom a copy, and the one operation less where it is none.
        (logits.view if logits.is_contiguous() else logits.reshape)(
            num_passes, num_items, num_classes
        ),
        bundle,
        shape,
        labelled,
        num_valid,
        partial(count_classes, target, weight, ignore_index, unlabelled_index, class_dim),
    )


def _terms(
    items: _Items, *, backward_passes: int, inplace: bool, impl: Implementation
) -> ItemTerms:
    nll, kl = rdrop_terms(
        items.logits, items.target, backward_passes=backward_passes, inplace=inplace, impl=impl
    )
    if items.logits.shape[0] > 1:
        check_finite_divergence(kl)
    if items.labelled is not None:
        # After the kernel, whose upstream gradient then is 0 there.
        nll = nll.masked_fill(~items.labelled, 0)
    return ItemTerms(nll.view(items.shape), kl.view(items.shape), *items.count_all())


def _check(
    logits: Tensor, target: Tensor, num_passes: int, weight: Tensor | None, class_dim: int
) -> tuple[int, ...]:
    """Return the items' shape, that of the target when it holds class indices."""
    check_floating("logits", logits)
    check_stacked("logits", logits, target, num_passes)
    check_class_dim("logits", logits, class_dim)
    shape = (target.shape[0], *_without(logits.shape, class_dim)[1:])
    if target.is_floating_point():
        if target.shape[1:] != logits.shape[1:]:
            raise ValueError(
                f"target of class probabilities must have the shape of one pass, "
                f"{(target.shape[0], *logits.shape[1:])}, got {tuple(target.shape)}"
            )
    elif target.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        if target.shape != shape:
            fitting = [d for d in (1, -1) if _without(logits.shape, d)[1:] == target.shape[1:]]
            raise ValueError(
                f"target of class indices must have the shape of one pass without the classes, "
                f"{shape}, got {tuple(target.shape)} for logits {tuple(logits.shape)} with "
                f"class_dim={class_dim}" + "".join(f"; class_dim={d} fits" for d in fitting)
            )
    else:
        raise TypeError(f"target must hold integers or probabilities, got {target.dtype}")
    num_classes = logits.shape[class_dim]
    if weight is not None and tuple(weight.shape) != (num_classes,):
        raise ValueError(
            f"weight must have one entry a class, shape ({num_classes},), got {tuple(weight.shape)}"
        )
    return shape


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Return a shape without one of its dimensions."""
    sizes = list(shape)
    del sizes[dim]
    return tuple(sizes)


class RDropCrossEntropyLoss(RDropLoss):
    """`rdrop_cross_entropy` as a module that holds the options; `alpha` may be changed at will."""

    weight: Tensor | None

    def __init__(
        self,
        alpha: float,
        *,
        num_passes: int = 2,
        weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        unlabelled_index: int | None = None,
        class_dim: int = -1,
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
        check_unlabelled_index(unlabelled_index, ignore_index)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.unlabelled_index = unlabelled_index
        self.class_dim = class_dim
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
            unlabelled_index=self.unlabelled_index,
            class_dim=self.class_dim,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            num_items=num_items,
            num_weight=num_weight,
            scale=self.scale,
            backward_passes=self.backward_passes,
            inplace=self.inplace,
            impl=self.impl,
        )
