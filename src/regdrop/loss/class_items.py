"""Items of one class each: a classifier's arguments, checked, in the form that kernels take."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX, check_flag, check_integer
from regdrop.kernels import Target, is_distributed, stack_rows, whole_tensor
from regdrop.kernels.precision import widest_dtype
from regdrop.loss.checks import (
    all_are_classes,
    check_class_dim,
    check_class_weight,
    check_classes,
    check_floating,
    check_own_memory,
    check_probabilities,
    check_several_classes,
    check_stacked,
    check_sums,
    check_unlabelled_index,
)
from regdrop.loss.counts import ItemCounts


def count_classes(
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    unlabelled_index: int | None = None,
    class_dim: int = -1,
) -> ItemCounts:
    """Return the number of items that count, and their number or class weight in the NLL."""
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
    # So that the count is right for logits in double.
    return ItemCounts(weights.sum(dtype=widest_dtype(weights.device)), count)


class ClassItems(NamedTuple):
    """The arguments, checked, in the form that kernels take."""

    logits: Tensor  # (num_passes, N, C)
    target: Target
    shape: tuple[int, ...]  # of the items
    labelled: Tensor | None  # (N,), where they count in the NLL; None: all that count do
    num_valid: int | Tensor  # a number wherever it is known without waiting for a device
    count_all: Callable[[], ItemCounts]

    def counts(self) -> tuple[int | Tensor, int | Tensor]:
        """Return the denominators of both terms, numbers where they are known."""
        if self.target.classes is None or (self.target.weight is None and self.labelled is None):
            return self.num_valid, self.num_valid
        return self.count_all().nll, self.num_valid


def enter_classes(
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
) -> ClassItems:
    """Check the arguments and bring them into the form that kernels take."""
    shape = check_classes_of(logits, target, num_passes, weight, class_dim)
    check_integer("ignore_index", ignore_index)
    check_flag("inplace", inplace)
    target, weight = whole_tensor(target), None if weight is None else whole_tensor(weight)
    if inplace:
        if is_distributed(logits):
            raise ValueError(
                "inplace=True needs plain logits, got a DTensor: a layer whose backward needs its "
                "output would not see that it was overwritten"
            )
        check_own_memory("logits", logits)
    num_items, num_classes = math.prod(shape), logits.shape[class_dim]
    labelled: Tensor | None = None
    num_valid: int | Tensor = num_items
    if target.is_floating_point():
        if unlabelled_index is not None:
            raise ValueError(
                f"unlabelled_index needs class indices, got unlabelled_index={unlabelled_index} "
                f"and class probabilities; mark items of an indexed target, or leave it out"
            )
        check_probabilities(target)
        check_sums(target, class_dim)
        probabilities = target.movedim(class_dim, -1).reshape(num_items, num_classes)
        kernel_target = Target(None, probabilities, weight, label_smoothing, None)
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
        kernel_target = Target(classes, None, weight, label_smoothing, valid)
    return ClassItems(
        stack_rows(logits, num_passes, class_dim),
        kernel_target,
        shape,
        labelled,
        num_valid,
        partial(count_classes, target, weight, ignore_index, unlabelled_index, class_dim),
    )


def check_classes_of(
    logits: Tensor, target: Tensor, num_passes: int, weight: Tensor | None, class_dim: int
) -> tuple[int, ...]:
    """Return the items' shape, that of the target when it holds class indices."""
    check_floating("logits", logits)
    check_stacked("logits", logits, target, num_passes)
    check_class_dim("logits", logits, class_dim)
    shape = (target.shape[0], *_without(logits.shape, class_dim)[1:])
    if target.is_floating_point():
        # Class indices may name the one class there is, as in torch; probabilities of it are labels
        # of yes or no.
        check_several_classes(logits, class_dim, num_passes)
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
    check_class_weight("weight", weight, logits.shape[class_dim])
    return shape


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Return a shape without one of its dimensions."""
    sizes = list(shape)
    del sizes[dim]
    return tuple(sizes)
