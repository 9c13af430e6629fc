"""Items whose logits a linear layer would give: checked, and without those that do not count."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from regdrop.arguments import check_integer, check_number
from regdrop.kernels import Projection, Target, check_implementation
from regdrop.kernels.projection import casts_itself
from regdrop.loss.checks import (
    check_class_weight,
    check_classes,
    check_floating,
    check_indices,
    check_plain,
    check_stacked,
    check_unlabelled_index,
)
from regdrop.loss.class_items import count_classes
from regdrop.loss.counts import ItemCounts
from regdrop.tracing import can_read


class ValidRows(NamedTuple):
    """The items that count; where none is dropped, all of them and which count."""

    positions: Tensor | None  # (n,), their positions among all items; None: all are there
    hidden: Tensor  # (num_passes, n, features)
    target: Target
    labelled: Tensor | None  # (n,), where they count in the NLL; None: all do
    counts: ItemCounts


def find_valid_rows(
    hidden: Tensor,
    target: Tensor,
    *,
    projection: Projection,
    num_passes: int,
    weight: Tensor | None,
    ignore_index: int,
    unlabelled_index: int | None,
    label_smoothing: float,
) -> ValidRows:
    """Check the arguments and drop, where that is free, the items that do not count."""
    _check(hidden, target, projection, num_passes, weight)
    check_integer("ignore_index", ignore_index)
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
    kernel_target = Target(classes, None, weight, label_smoothing, valid)
    counts = count_classes(target, weight, ignore_index, unlabelled_index)
    return ValidRows(index, passes, kernel_target, labelled, counts)


def drops_rows(device: torch.device) -> bool:
    """Return whether ignored items are left out: other devices would be waited for to count them.

    A compiled function keeps them too, whose shapes would depend on their number.
    """
    return can_read(device)


_OF_SHARDS = (
    "under FSDP2 leave the last layer to the root's fully_shard, or call unshard() of it before "
    "the loss (the gradient of full_tensor() is not summed over the processes)"
)


def _check(
    hidden: Tensor,
    target: Tensor,
    projection: Projection,
    num_passes: int,
    class_weight: Tensor | None,
) -> None:
    weight, bias, dtype = projection.weight, projection.bias, projection.dtype
    scale, softcap = projection.scale, projection.softcap
    check_plain("hidden", hidden)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_plain(name, tensor, _OF_SHARDS)
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    check_stacked("hidden", hidden, target, num_passes)
    advice = "; class probabilities are taken by rdrop_cross_entropy, from explicit logits"
    check_indices(target, advice)
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
    if bias is not None:
        check_floating("bias", bias)
        if tuple(bias.shape) != weight.shape[:1]:
            raise ValueError(
                f"bias must have one entry a class, shape ({len(weight)},), got {tuple(bias.shape)}"
            )
    check_class_weight("class_weight", class_weight, len(weight))
    is_cast = dtype is not None or casts_itself(hidden.device)
    if hidden.dtype != weight.dtype and not is_cast:
        raise TypeError(
            f"hidden and weight must have one dtype outside autocast, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    check_implementation(projection.impl)
    check_number("logit_scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"logit_scale must be finite, got {scale}")
    if softcap is not None:
        check_number("softcap", softcap)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or above 0, got {softcap}")
    for name in ("chunk_size", "block_size"):
        check_integer(name, getattr(projection, name), low=1, or_none=True)
