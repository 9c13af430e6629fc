"""Fraternal dropout (Zolna et al. 2018): the squared difference of logits in place of the KL."""

from itertools import combinations

import torch
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.kernels.backward_passes import limit_backward
from regdrop.kernels.precision import widen
from regdrop.loss.checks import check_indices, check_plain, check_tensor
from regdrop.loss.class_items import count_classes
from regdrop.loss.counts import counted_by
from regdrop.loss.cross_entropy import cross_entropy_terms
from regdrop.loss.terms import ItemTerms


@counted_by(count_classes)
def fraternal_terms(
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
) -> ItemTerms:
    """Return the NLL, and the squared difference of two passes' logits, mean over classes.

    With num_passes 2 and the scale "mean" the loss is the paper's (equation 3 of arXiv 1711.00066),
    its kappa half of our alpha.

    Args:
        logits: As in `rdrop_cross_entropy`.
        target: Class indices (batch, ...), int64.
        num_passes: Number of passes; the mean is over pairs.
        weight: As in `rdrop_cross_entropy`.
        ignore_index: As in `rdrop_cross_entropy`.
        unlabelled_index: As in `rdrop_cross_entropy`.
        class_dim: As in `rdrop_cross_entropy`.
        label_smoothing: As in `rdrop_cross_entropy`.
        backward_passes: As in `rdrop_cross_entropy`.

    Raises:
        TypeError: For class probabilities, and tensors of the wrong kind.
        ValueError: For options out of range, shapes that do not fit, or targets out of range (on
            the CPU).
    """
    check_plain("logits", logits)
    check_tensor("target", target)
    check_indices(target)
    own = cross_entropy_terms(
        logits,
        target,
        num_passes=num_passes,
        weight=weight,
        ignore_index=ignore_index,
        unlabelled_index=unlabelled_index,
        class_dim=class_dim,
        label_smoothing=label_smoothing,
        backward_passes=backward_passes,
    )
    rows = logits.movedim(class_dim, -1)
    passes = rows.reshape(num_passes, *own.nll.shape, rows.shape[-1])
    passes = limit_backward(widen(passes), backward_passes)
    pairs = [_difference(a, b).square().mean(-1) for a, b in combinations(passes, 2)]
    if not pairs:
        return own
    difference = torch.stack(pairs).mean(0).masked_fill(target.long() == ignore_index, 0)
    return own._replace(kl=difference)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    # A class masked with the same infinity in both passes contributes nothing.
    is_masked = (a == b) & torch.isinf(a)
    return a.masked_fill(is_masked, 0) - b.masked_fill(is_masked, 0)
