"""Along which dimension of the logits the classes of a loss lie, by shapes and by its slope."""

import torch
import torch.nn.functional as F
from torch import Tensor

from regdrop.integrations.transformers.likelihood.read_output import ReadOutput

# The part of a loss's slope that may not cancel over the classes, where it is one of a softmax and
# has a small term of another kind, such as one on the normaliser. That of 10,000 numbers, each with
# a loss of its own, leaves as much by chance.
_SOFTMAX_TOLERANCE = 1e-2
# How far a loss's slope may be from that of a yes or no for each class.
_LIKENESS_TOLERANCE = 1e-4


def find_class_dim(read: ReadOutput) -> tuple[int, bool | None]:
    """Return the dimension of the classes, and whether the loss is one of classes.

    None where nobody knows.
    """
    logits, labels = read.logits, read.labels
    class_dim, is_of_classes = _by_shapes_and_slope(logits, labels, read.slope)
    is_whole = labels is not None and not labels.is_floating_point()
    is_of_elements = labels is not None and labels.numel() == logits.numel()
    if is_whole and is_of_classes is False and not is_of_elements:
        return _by_labels(read)
    return class_dim, is_of_classes


def _by_shapes_and_slope(
    logits: Tensor, labels: Tensor | None, slope: Tensor | None
) -> tuple[int, bool | None]:
    if logits.dim() < 2 or logits.shape[-1] == 1:
        return -1, None
    second = (len(logits), *logits.shape[2:]) if logits.dim() > 2 else None
    is_second = labels is not None and labels.shape == second != logits.shape[:-1]
    dims = (1, -1) if is_second else (-1, 1) if second is not None else (-1,)
    if slope is None:
        is_whole = labels is not None and not labels.is_floating_point()
        # Labels of pixels may be of a larger picture than the logits.
        is_picture = logits.dim() > 3 and labels is not None and labels.dim() == logits.dim() - 1
        is_picture = is_picture and labels is not None and labels.shape != logits.shape[:-1]
        return 1 if is_whole and (is_second or is_picture) else -1, None
    return _first_of_classes(slope, dims)


def _by_labels(read: ReadOutput) -> tuple[int, bool | None]:
    """Return the same by what the slope is for other labels.

    Terms that read no label, as of a teacher, or one on the logits' size, are in both slopes.
    """
    assert read.label is not None
    labels: Tensor = read.inputs[read.label]
    dims = (-1,) if read.logits.dim() == 2 else (-1, 1)
    # Those that are there, in other places: others may be none that the loss knows.
    counted = (labels >= 0) & (labels < max(read.logits.shape[dim] for dim in dims))
    moved = labels.masked_scatter(counted, labels[counted].roll(1))
    if torch.equal(moved, labels):
        # All are of one class: the first one becomes the lowest other, which every loss knows.
        counted = labels >= 0
        first = (counted.flatten().cumsum(0) == 1).view(labels.shape) & counted
        moved = torch.where(first, (labels == 0).to(labels.dtype), labels)
    before, after = read.slope, read.slope_for({read.label: moved})
    if before is None or after is None or torch.equal(before, after):
        return dims[0], None
    return _first_of_classes(after - before, dims)


def are_yes_or_no(read: ReadOutput, class_dim: int) -> bool:
    """Return whether a loss takes each class as a yes or no, of which a label names the one yes.

    Args:
        read: The logits, with a label for each item.
        class_dim: The dimension of the classes.
    """
    logits = read.logits.detach().float().movedim(class_dim, -1)
    labels = read.labels
    if read.slope is None or labels is None or labels.shape != logits.shape[:-1]:
        return False
    slope = read.slope.float().movedim(class_dim, -1)
    counted = slope.any(-1) & (labels >= 0) & (labels < logits.shape[-1])
    if not bool(counted.any()):
        return False
    expected = logits.sigmoid()[counted]
    expected -= F.one_hot(labels[counted].long(), logits.shape[-1])
    likeness = F.cosine_similarity(slope[counted].flatten(), expected.flatten(), dim=0)
    return bool(likeness > 1 - _LIKENESS_TOLERANCE)


def _first_of_classes(slope: Tensor, dims: tuple[int, ...]) -> tuple[int, bool]:
    """Return the first dimension over which a slope is one of classes; else the first of all."""
    fitting = [dim for dim in dims if _is_of_classes(slope, dim)]
    return (fitting[0], True) if fitting else (dims[0], False)


def _is_of_classes(slope: Tensor, class_dim: int) -> bool:
    """Return whether a loss has the slope of one of a softmax: its sum over the classes is 0.

    Where each row is scored against the others of its batch, columns may be classes too.
    """
    slope = slope.float()
    is_square = slope.dim() == 2 and slope.shape[0] == slope.shape[1]
    sums = slope.sum() if is_square else slope.sum(class_dim)
    return bool(sums.abs().sum() <= _SOFTMAX_TOLERANCE * slope.abs().sum())
