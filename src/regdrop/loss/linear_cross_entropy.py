"""R-Drop for one class an item, with the linear layer before it: the full logits never exist."""

from functools import partial

import torch
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.kernels import Implementation, Projection, linear_loss, linear_terms
from regdrop.kernels.backward_passes import graded_passes
from regdrop.kernels.closed_form import Weight
from regdrop.kernels.precision import accumulation_dtype
from regdrop.loss.checks import (
    check_counts,
    check_finite_divergence,
    check_label_smoothing,
    check_options,
    check_passes,
)
from regdrop.loss.class_items import count_classes
from regdrop.loss.counts import counted_by
from regdrop.loss.linear_items import ValidRows, find_valid_rows
from regdrop.loss.output import RDropOutput, Reduction, Scale
from regdrop.loss.reduction import WeightedSum, combine_terms, reduce_sums
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
    scale: Scale = "mean",
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
        weight: (C, features), that of the layer, as in `torch.nn.functional.linear`; of the dtype
            of `hidden` unless autocast is on. Weights of classes are `class_weight`.
        target: The original, unstacked target: class indices (batch, ...), int64.
        alpha: Weight of the divergence, the paper's.
        bias: (C,).
        num_passes: Number of passes that are stacked; 1, with alpha 0, is training without R-Drop.
        class_weight: (C,) weight of each class in the NLL: the `weight` of other losses.
        ignore_index: Index that marks an item that counts in neither term.
        unlabelled_index: Index that marks an item without a label, which counts in the divergence
            alone.
        label_smoothing: Smoothing of the NLL's target; the divergence compares raw outputs.
        reduction: "mean" over what counts, "sum", or "none" (one number an item).
        num_items: Denominator of both terms under "mean" instead of the number that counts here: a
            total over an accumulation window and all ranks.
        scale: "mean" for a loss on the scale of training without R-Drop, "sum" for the paper's,
            which is `num_passes` times that.
        logit_scale: A number that multiplies the logits, as in Cohere's models; or a scalar tensor,
            which gets its gradient and multiplies `hidden` (and `bias`) in their dtype.
        softcap: Bound c of the logits, `c * tanh(logits / c)`, as in Gemma 2.
        chunk_size: Items a chunk; by default as many on a CPU as take no more memory than `hidden`,
            and at least 256 rows of all passes, more in half precision. On a GPU a number asks for
            chunks of items.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.
        num_weight: Denominator of the NLL alone under "mean": the total class weight, or number, of
            the labelled items. Defaults to `num_items`.
        impl: "auto", or how to compute it: "chunked", "compiled", "cpp" or "triton"
            (docs/performance.md); what compares the logits of a chunk. There is no "eager".

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
    """Return the terms of every item, in the shape of the target.

    They are those of `linear_rdrop_cross_entropy`, whose `weight` is that of the layer and here the
    `projection`'s.

    Args:
        hidden: (num_passes * batch, ..., features), floating point; pass 0 of the whole batch
            first.
        target: The original, unstacked target: class indices (batch, ...), int64.
        projection: The layer, and how its logits are computed.
        num_passes: Number of passes that are stacked; with 1 only the NLL is computed.
        weight: (C,) weight of each class in the NLL, as in `cross_entropy_terms`: the
            `class_weight` of `linear_rdrop_cross_entropy`.
        ignore_index: As in `linear_rdrop_cross_entropy`.
        unlabelled_index: As in `linear_rdrop_cross_entropy`.
        label_smoothing: As in `linear_rdrop_cross_entropy`.
        backward_passes: As in `linear_rdrop_cross_entropy`.

    Returns:
        The terms, float32 for half precision; 0 where an item does not count.

    Raises:
        TypeError: For tensors of the wrong kind; class probabilities are not taken.
        ValueError: As `linear_rdrop_cross_entropy`.
    """
    check_passes(num_passes, backward_passes)
    check_label_smoothing(label_smoothing)
    found = find_valid_rows(
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
        backward_passes=graded_passes(num_passes, backward_passes),
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
    scale: Scale = "mean",
    num_items: Tensor | float | None = None,
    num_weight: Tensor | float | None = None,
    backward_passes: int | None = None,
    items: Tensor | None = None,
) -> RDropOutput:
    """Return the loss, its gradient computed at once since the weights of both terms are known.

    Args:
        hidden: (num_passes * batch, ..., features), as in `linear_rdrop_cross_entropy`.
        target: The original, unstacked target: class indices (batch, ...), int64.
        projection: The layer, with the weight that `linear_rdrop_cross_entropy` takes as `weight`.
        alpha: Weight of the divergence, the paper's.
        num_passes: Number of passes that are stacked; 1, with alpha 0, is training without R-Drop.
        weight: (C,) weight of each class in the NLL: the `class_weight` of
            `linear_rdrop_cross_entropy`.
        ignore_index: Index that marks an item that counts in neither term.
        unlabelled_index: Index that marks an item without a label, which counts in the divergence
            alone.
        label_smoothing: Smoothing of the NLL's target; the divergence compares raw outputs.
        reduction: "mean" over what counts, "sum", or "none" (one number an item).
        scale: "mean" for a loss on the scale of training without R-Drop, "sum" for the paper's,
            which is `num_passes` times that.
        num_items: Denominator of both terms under "mean" instead of the number that counts here: a
            total over an accumulation window and all ranks.
        num_weight: Denominator of the NLL alone under "mean": the total class weight, or number, of
            the labelled items. Defaults to `num_items`.
        backward_passes: Number of first passes that carry the gradient, scaled so that it stays
            unbiased; the others may come from a forward without gradient. None: all.
        items: Positions (n,) of the items that all passes but the first saw: the NLL is that of
            pass 0, the divergence that of the part, weighted by its inverse share.

    Raises:
        ValueError: For reduction "none", and as in `linear_rdrop_cross_entropy`.
    """
    check_options(
        alpha=alpha,
        num_passes=num_passes,
        reduction=reduction,
        scale=scale,
        backward_passes=backward_passes,
        label_smoothing=label_smoothing,
    )
    if reduction == "none":
        raise ValueError(
            "reduction must be 'mean' or 'sum', got 'none'; linear_cross_entropy_terms returns the "
            "terms of every item"
        )
    check_counts(reduction, num_items=num_items, num_weight=num_weight)
    if items is not None and (
        not isinstance(items, Tensor) or items.dtype != torch.int64 or items.dim() != 1
    ):
        got = f"shape {tuple(items.shape)}" if isinstance(items, Tensor) else type(items).__name__
        raise TypeError(f"items must be a tensor of positions, (n,) in int64, got {got}")
    rows_of = partial(
        find_valid_rows,
        projection=projection,
        weight=weight,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        label_smoothing=label_smoothing,
    )
    graded = graded_passes(num_passes, backward_passes)
    if items is None:
        whole = rows_of(hidden, target, num_passes=num_passes)
        weighted_sum = _weighted_sum(whole, projection, graded)
    else:
        # Pass 0 of the whole batch stands first, then the other passes of those items alone.
        first, others = hidden[: target.shape[0]], hidden[target.shape[0] :]
        whole = rows_of(first, target, num_passes=1)
        both = torch.cat([first.index_select(0, items), others])
        part = rows_of(both, target[items], num_passes=num_passes)
        share = target.shape[0] / max(1, items.numel())
        sums = _weighted_sum(whole, projection, 1), _weighted_sum(part, projection, graded)
        weighted_sum = partial(_weighted_sum_of_a_part, *sums, share)
    # It finds the weights of both terms from their counts, then calls `weighted_sum` with them.
    output = reduce_sums(
        weighted_sum,
        *whole.counts,
        accumulation_dtype(hidden.dtype),
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


def _weighted_sum(rows: ValidRows, projection: Projection, backward_passes: int) -> WeightedSum:
    """Return what sums both terms over rows, once their weights are known."""
    return partial(
        linear_loss,
        *(rows.hidden, projection, rows.target),
        backward_passes=backward_passes,
        labelled=rows.labelled,
    )


def _weighted_sum_of_a_part(
    whole: WeightedSum, part: WeightedSum, share: float, *, nll_weight: Weight, kl_weight: Weight
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of the NLL of all rows, and of the divergence of a part of them.

    Args:
        whole: Sums over the rows of pass 0.
        part: Sums over those of the part in all passes.
        share: How many times the part makes the whole.
        nll_weight: Weight of the NLL.
        kl_weight: Weight of the divergence.
    """
    weighted_nll, nll, _ = whole(nll_weight=nll_weight, kl_weight=None)
    kl_weight = None if kl_weight is None else kl_weight * share
    weighted_kl, _, kl = part(nll_weight=None, kl_weight=kl_weight)
    return weighted_nll + weighted_kl, nll, kl * share
