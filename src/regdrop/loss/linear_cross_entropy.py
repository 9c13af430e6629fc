"""R-Drop for one class an item, with the linear layer before it: the full logits never exist."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX, check_number
from regdrop.kernels import Implementation, Projection, Target, linear_loss, linear_terms
from regdrop.kernels.closed_form import Weight
from regdrop.kernels.projection import casts_itself
from regdrop.loss.checks import (
    check_classes,
    check_counts,
    check_finite_divergence,
    check_floating,
    check_options,
    check_stacked,
    check_unlabelled_index,
)
from regdrop.loss.counts import ItemCounts, counted_by
from regdrop.loss.cross_entropy import count_classes
from regdrop.loss.output import RDropOutput
from regdrop.loss.reduction import (
    Reduction,
    Scale,
    combine_terms,
    reduce_sums,
)
from regdrop.loss.terms import ItemTerms


def linear_rdrop_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    alpha: float,
    bias: Tensor | None = None,
    num_passes: int = 2,
    class_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    unlabelled_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    scale: Scale = "sum",
    logit_scale: Tensor | float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    backward_passes: int | None = None,
    num_weight: Tensor | float | None = None,
    impl: Implementation = "auto",
) -> RDropOutput:
    """Compute `rdrop_cross_entropy` of `hidden @ weight.T + bias` without those logits.

    On a CPU items are worked off in chunks, the ignored ones not at all: under "mean" and "sum" the
    gradients are computed in the forward, by the three matrix products of a linear layer; under
    "none" the backward computes the logits again. On a GPU it is blocks of classes, or chunks where
    they are better, and ignored items are computed and count for nothing: nobody waits for the
    device to say how many they are.

    Args:
        hidden: (num_passes * batch, ..., features), float16, bfloat16, float32 or float64; pass 0
            of the whole batch first. Matrices are multiplied in their dtype, or autocast's, and
            everything else is computed in float32 at least.
        weight: (C, features), as in `torch.nn.functional.linear`; of the dtype of `hidden` unless
            autocast is on.
        target: The original, unstacked target: class indices (batch, ...), int64.
        alpha: Weight of the divergence, the paper's.
        bias: (C,).
        num_passes: Number of passes in `hidden`; 1 with alpha 0 is plain cross entropy.
        class_weight: (C,) weight of each class in the likelihood.
        ignore_index: Index that marks an item that counts in neither term.
        unlabelled_index: Index that marks an item that counts in the divergence alone, as in
            `rdrop_cross_entropy`.
        label_smoothing: Smoothing of the likelihood's target.
        reduction: As in `rdrop_cross_entropy`, as are the following three.
        num_items: Denominator of both terms under "mean".
        scale: "sum" or "mean".
        logit_scale: A number that multiplies the logits, as in Cohere's models; or a scalar
            tensor, which gets its gradient and multiplies `hidden` (and `bias`) in their dtype.
        softcap: Bound c of the logits, `c * tanh(logits / c)`, as in Gemma 2.
        chunk_size: Items a chunk; by default as many on a CPU as take no more memory than `hidden`,
            and at least 256 rows of all passes, more in half precision. On a GPU a number asks for
            chunks of items.
        backward_passes: As in `rdrop_cross_entropy`.
        num_weight: As in `rdrop_cross_entropy`.
        impl: As in `rdrop_cross_entropy`, but for "eager": what compares the logits of a chunk.

    Returns:
        The loss and its two parts, float32 for half precision.

    Raises:
        TypeError: For tensors of the wrong kind; class probabilities are not taken.
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
    if isinstance(logit_scale, Tensor):
        # Left to autograd, since nothing but the gradients of both is needed for that of the scale.
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale must be a scalar, got {tuple(logit_scale.shape)}")
        logit_scale = logit_scale.reshape(())
        hidden = (hidden * logit_scale).to(hidden.dtype)
        bias = None if bias is None else (bias * logit_scale).to(bias.dtype)
        logit_scale = 1.0
    projection = Projection(weight, bias, logit_scale, softcap, chunk_size, impl=impl)
    if reduction == "none":
        terms = linear_cross_entropy_terms(
            hidden,
            target,
            projection=projection,
            num_passes=num_passes,
            weight=class_weight,
            ignore_index=ignore_index,
            unlabelled_index=unlabelled_index,
            label_smoothing=label_smoothing,
            backward_passes=backward_passes,
        )
        return combine_terms(
            terms, alpha=alpha, num_passes=num_passes, reduction=reduction, scale=scale
        )
    return linear_cross_entropy_loss(
        hidden,
        target,
        projection=projection,
        alpha=alpha,
        num_passes=num_passes,
        weight=class_weight,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        scale=scale,
        num_items=num_items,
        num_weight=num_weight,
        backward_passes=backward_passes,
    )


@counted_by(count_classes)
def linear_cross_entropy_terms(
    hidden: Tensor,
    target: Tensor,
    /,
    *,
    projection: Projection,
    num_passes: int,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    unlabelled_index: int | None = None,
    label_smoothing: float = 0.0,
    backward_passes: int | None = None,
) -> ItemTerms:
    """Return the terms of every item, in the shape of the target; see above."""
    found = _valid_rows(
        hidden,
        target,
        projection=projection,
        num_passes=num_passes,
        weight=weight,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        label_smoothing=label_smoothing,
    )
    nll, kl = linear_terms(
        found.hidden,
        projection,
        found.target,
        backward_passes=num_passes if backward_passes is None else backward_passes,
    )
    if num_passes > 1:
        check_finite_divergence(kl)
    if found.labelled is not None:
        nll = nll.masked_fill(~found.labelled, 0)
    if found.positions is not None:
        empty = nll.new_zeros(target.numel())
        nll, kl = (empty.index_add(0, found.positions, term) for term in (nll, kl))
    return ItemTerms(nll.view(target.shape), kl.view(target.shape), *found.counts)


def linear_cross_entropy_loss(
    hidden: Tensor,
    target: Tensor,
    /,
    *,
    projection: Projection,
    alpha: float,
    num_passes: int,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    unlabelled_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    scale: Scale = "sum",
    num_items: Tensor | float | None = None,
    num_weight: Tensor | float | None = None,
    backward_passes: int | None = None,
    items: Tensor | None = None,
) -> RDropOutput:
    """Return the loss, its gradient computed at once since the weights of both terms are known.

    Args:
        hidden: As in `linear_rdrop_cross_entropy`.
        target: As there.
        projection: The layer.
        alpha: As there, as are the following but the last; "none" is no reduction of this one.
        num_passes: See above.
        weight: Its class_weight.
        ignore_index: See above.
        unlabelled_index: See above.
        label_smoothing: See above.
        reduction: "mean" or "sum".
        scale: See above.
        num_items: See above.
        num_weight: See above.
        backward_passes: See above.
        items: Positions (n,) of the items that all passes but the first saw: the likelihood is
            that of pass 0, the divergence that of the part, weighted by its inverse share.
    """
    find_rows = partial(
        _valid_rows,
        projection=projection,
        weight=weight,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        label_smoothing=label_smoothing,
    )
    first = hidden if items is None else hidden[: target.shape[0]]
    whole = find_rows(first, target, num_passes=num_passes if items is None else 1)
    graded = num_passes if backward_passes is None else backward_passes

    def compute(
        found: _ValidRows, backward_passes: int, *, nll_weight: Weight, kl_weight: Weight
    ) -> tuple[Tensor, Tensor, Tensor]:
        return linear_loss(
            *(found.hidden, projection, found.target),
            nll_weight=nll_weight,
            kl_weight=kl_weight,
            backward_passes=backward_passes,
            labelled=found.labelled,
        )

    def sum_of_a_part(*, nll_weight: Weight, kl_weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
        assert items is not None
        likelihood, nll, _ = compute(whole, 1, nll_weight=nll_weight, kl_weight=None)
        share = target.shape[0] / items.numel()
        both = torch.cat([first.index_select(0, items), hidden[target.shape[0] :]])
        part = find_rows(both, target[items], num_passes=num_passes)
        kl_weight = None if kl_weight is None else kl_weight * share
        divergence, _, kl = compute(part, graded, nll_weight=None, kl_weight=kl_weight)
        return likelihood + divergence, nll, kl * share

    output = reduce_sums(
        partial(compute, whole, graded) if items is None else sum_of_a_part,
        *whole.counts,
        torch.promote_types(hidden.dtype, torch.float32),
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


class _ValidRows(NamedTuple):
    """The items that count; where none is dropped, all of them and which count."""

    positions: Tensor | None  # (n,), their positions among all items; None: all are there
    hidden: Tensor  # (num_passes, n, features)
    target: Target
    labelled: Tensor | None  # (n,), where they count in the likelihood; None: all do
    counts: ItemCounts


def _valid_rows(
    hidden: Tensor,
    target: Tensor,
    *,
    projection: Projection,
    num_passes: int,
    weight: Tensor | None,
    ignore_index: int,
    unlabelled_index: int | None,
    label_smoothing: float,
) -> _ValidRows:
    """Check the arguments and drop, where that is free, the items that do not count."""
    _check(hidden, target, projection, num_passes, weight)
    num_items, num_classes = target.numel(), projection.weight.shape[0]
    check_unlabelled_index(unlabelled_index, ignore_index, num_classes)
    classes = target.reshape(-1).long()
    passes = hidden.reshape(num_passes, num_items, hidden.shape[-1])
    counts_at = classes != ignore_index
    index = valid = None
    if drops_rows(hidden.device):
        index = counts_at.nonzero()[:, 0]
        if index.numel() < num_items:
            passes = passes.index_select(1, index)
        classes = classes[index]
    else:
        valid = counts_at
        classes = classes * valid  # any class, in one operation
    labelled = None
    if unlabelled_index is not None:
        labelled = classes != unlabelled_index
        classes = torch.where(labelled, classes, 0)
    check_classes(classes, num_classes, ignore_index, unlabelled_index)
    bundle = Target(classes, None, weight, label_smoothing, valid)
    counts = count_classes(target, weight, ignore_index, unlabelled_index)
    return _ValidRows(index, passes, bundle, labelled, counts)


def drops_rows(device: torch.device) -> bool:
    """Return whether ignored items are left out: other devices would be waited for to count them.

    A compiled function keeps them too, whose shapes would depend on their number.
    """
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _check(
    hidden: Tensor,
    target: Tensor,
    projection: Projection,
    num_passes: int,
    class_weight: Tensor | None,
) -> None:
    weight, bias, scale, softcap, chunk_size, dtype, _ = projection
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    check_stacked("hidden", hidden, target, num_passes)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"target must hold class indices, got {target.dtype}; class probabilities are taken by "
            "rdrop_cross_entropy, from explicit logits"
        )
    if hidden.dim() < 2 or target.shape[1:] != hidden.shape[1:-1]:
        raise ValueError(
            "target must have the shape of one pass of hidden without the features, "
            f"got {tuple(target.shape)} for hidden {tuple(hidden.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (classes, features) with {hidden.shape[-1]} features, as hidden has, "
            f"got {tuple(weight.shape)}"
        )
    for name, vector in (("bias", bias), ("class_weight", class_weight)):
        if vector is None:
            continue
        check_floating(name, vector)
        if tuple(vector.shape) != (weight.shape[0],):
            raise ValueError(
                f"{name} must have one entry a class, shape ({weight.shape[0]},), "
                f"got {tuple(vector.shape)}"
            )
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError("class_weight must not require a gradient, got one that does; detach it")
    is_cast = dtype is not None or casts_itself(hidden.device)
    if hidden.dtype != weight.dtype and not is_cast:
        raise TypeError(
            f"hidden and weight must have one dtype outside autocast, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    check_number("logit_scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"logit_scale must be finite, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be None or above 0, got {softcap}")
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1
    ):
        raise ValueError(f"chunk_size must be None or at least 1, got {chunk_size!r}")
