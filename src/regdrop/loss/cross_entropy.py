"""R-Drop for one class an item: cross entropy and the KL between softmax outputs."""

from functools import partial
from typing import Any

from torch import Tensor

from regdrop.arguments import IGNORE_INDEX, check_flag, check_integer
from regdrop.kernels import Implementation, check_implementation, rdrop_sum, rdrop_terms, whole_loss
from regdrop.kernels.backward_passes import graded_passes
from regdrop.kernels.precision import accumulation_dtype
from regdrop.loss.checks import (
    LARGEST_DIVERGENCE,
    check_counts,
    check_finite_divergence,
    check_label_smoothing,
    check_options,
    check_passes,
    check_real,
    check_unlabelled_index,
)
from regdrop.loss.class_items import ClassItems, count_classes, enter_classes
from regdrop.loss.counts import counted_by
from regdrop.loss.module import RDropLoss
from regdrop.loss.output import RDropOutput, Reduction, Scale
from regdrop.loss.reduction import combine_terms, reduce_sums, term_weights
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
    scale: Scale = "mean",
    backward_passes: int | None = None,
    inplace: bool = False,
    impl: Implementation = "auto",
) -> RDropOutput:
    """Compute the R-Drop loss of a classifier (equation 4 of arXiv 2106.14448).

    Args:
        logits: (num_passes * batch, ..., C), float16, bfloat16, float32 or float64; pass 0 of the
            whole batch first, then pass 1 (the layout of `repeat_batch`). Half precision is
            computed in float32. A DTensor may be spread over processes by classes; the target is
            then the same in each of them.
        target: The original, unstacked target: class indices (batch, ...), int64, or class
            probabilities (batch, ..., C), with the classes where those of `logits` are.
        alpha: Weight of the divergence, the paper's.
        num_passes: Number of passes that are stacked; 1, with alpha 0, is training without R-Drop.
        weight: (C,) weight of each class in the NLL, as in torch's cross entropy.
        ignore_index: Index that marks an item that counts in neither term.
        unlabelled_index: Index that marks an item without a label, which counts in the divergence
            alone. The NLL is a mean over the labelled items, the divergence over all that are not
            ignored. Any number but a class and `ignore_index`. None: no item is.
        class_dim: Dimension of the classes in `logits`; 1 for torch's own layout, (batch, C, ...).
            Where other dimensions have as many elements as there are classes, no check can tell a
            wrong one.
        label_smoothing: Smoothing of the NLL's target; the divergence compares raw outputs.
        reduction: "mean" over what counts, "sum", or "none" (one number an item).
        num_items: Denominator of both terms under "mean" instead of the number that counts here: a
            total over an accumulation window and all ranks. Above 0; a tensor may be 0, the count
            of a window in which nothing counts.
        num_weight: Denominator of the NLL alone under "mean": the total class weight, or number, of
            the labelled items. Defaults to `num_items`.
        scale: "mean" for a loss on the scale of training without R-Drop, "sum" for the paper's,
            which is `num_passes` times that.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.
        inplace: Let the gradient overwrite `logits` in the backward, which saves their memory. A
            layer whose own backward needs its output raises. Logits that have to be copied to have
            their classes last, as (batch, C, ...) have, are overwritten in the copy.
        impl: "auto", or how to compute it: "chunked", "compiled", "cpp" or "triton"
            (docs/performance.md), and "eager", the definition.

    Returns:
        The loss and its two parts, float32 for half-precision logits.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For options out of range, shapes that do not fit, targets out of range (on
            the CPU), a class masked with -inf in one pass only, or a DTensor that is spread in
            another way than by classes.
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
    check_implementation(impl)
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
    items = enter_classes(
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
        "backward_passes": graded_passes(num_passes, backward_passes),
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
        accumulation_dtype(logits.dtype),
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
    check_integer("ignore_index", ignore_index)
    check_flag("inplace", inplace)
    if reduction == "none":
        return None
    nll_weight, kl_weight = term_weights(alpha, num_passes, scale)
    found = whole_loss(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        nll_weight=nll_weight,
        kl_weight=kl_weight if alpha else None,
        is_mean=reduction == "mean",
        num_passes=num_passes,
        backward_passes=graded_passes(num_passes, backward_passes),
        inplace=inplace,
        largest_divergence=LARGEST_DIVERGENCE,
    )
    return None if found is None else RDropOutput(*found)


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
    """Return the terms of every item, in the shape of the class indices.

    They are those of `rdrop_cross_entropy`.

    Args:
        logits: (num_passes * batch, ..., C), floating point; pass 0 of the whole batch first.
        target: The original, unstacked target: class indices (batch, ...) or class probabilities
            (batch, ..., C).
        num_passes: Number of passes that are stacked; with 1 only the NLL is computed.
        weight: (C,) weight of each class in the NLL.
        ignore_index: As in `rdrop_cross_entropy`.
        unlabelled_index: As in `rdrop_cross_entropy`.
        class_dim: As in `rdrop_cross_entropy`.
        label_smoothing: As in `rdrop_cross_entropy`.
        backward_passes: As in `rdrop_cross_entropy`.
        inplace: As in `rdrop_cross_entropy`.
        impl: As in `rdrop_cross_entropy`.

    Returns:
        The terms, float32 for half-precision logits; 0 where an item does not count.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: As `rdrop_cross_entropy`.
    """
    check_passes(num_passes, backward_passes)
    check_label_smoothing(label_smoothing)
    items = enter_classes(
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
        backward_passes=graded_passes(num_passes, backward_passes),
        inplace=inplace,
        impl=impl,
    )


def _terms(
    items: ClassItems, *, backward_passes: int, inplace: bool, impl: Implementation
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
        scale: Scale = "mean",
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
        check_integer("ignore_index", ignore_index)
        check_unlabelled_index(unlabelled_index, ignore_index)
        check_integer("class_dim", class_dim)
        check_flag("inplace", inplace)
        check_implementation(impl)
        check_real("weight", weight)
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
