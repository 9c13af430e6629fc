"""Which items of the logits a loss of classes reads: by labels, by a mask, by its slope."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.integrations.transformers.evaluation import with_shorter_masks
from regdrop.integrations.transformers.likelihood.divergence import Divergence
from regdrop.integrations.transformers.likelihood.read_output import ReadOutput

# Labels that are tried as one that does not count.
_MOST_LABELS = 8


def divergence_of_items(read: ReadOutput, class_dim: int) -> Divergence:
    """Return the KL of classes, over the items that the loss reads.

    They are those that labels tell, or a mask of the items' shape.
    """
    found = Divergence("classes", read.key, class_dim=class_dim)
    items = read.logits.movedim(class_dim, -1).shape[:-1]
    acts = None if read.slope is None else read.slope.any(class_dim)
    labels = read.labels
    if labels is not None and (labels.is_floating_point() or labels.dim() != len(items)):
        labels = None
    if acts is not None and labels is not None and _is_behind(labels, items, acts):
        acts, found = acts[:, -labels.shape[1] :], replace(found, is_tail=True)
        items = acts.shape
    if labels is not None and labels.shape != items:
        labels = None
    # Rows alone may be left out for what they are, unless labels tell.
    may_tell = len(items) > 1 or labels is not None
    if acts is not None and may_tell and not bool(acts.all()):
        for other in _telling(found, read, labels, acts):
            for is_shifted in (False, True)[: len(items)]:
                moved = replace(other, is_shifted=is_shifted)
                is_told = torch.equal(moved.counted(read.inputs, len(acts)), acts)
                if is_told and _is_confirmed(moved, read):
                    return moved
    if labels is not None and bool((labels == IGNORE_INDEX).any()):
        return replace(found, mask=read.label)
    # Labels may be padded by one of themselves: then a mask tells.
    obeyed = obeyed_mask(read, items) if class_dim == -1 else None
    attention = read.inputs.get("attention_mask")
    if obeyed is None and isinstance(attention, Tensor) and attention.shape == items:
        obeyed = "attention_mask"
    return replace(found, mask=obeyed or (None if labels is None else read.label))


def obeyed_mask(read: ReadOutput, shape: torch.Size) -> str | None:
    """Return the name of a mask of the items' shape without which a loss reads no logits."""
    for name, batch in with_shorter_masks(read.inputs, shape):
        before = _acting(read.slope, shape)
        # A model may have no such mask.
        after = _acting(read.slope_for(batch), shape)
        if before is None or after is None:
            continue
        cut = read.inputs[name] != batch[name]
        if bool(before[cut].any()) and not bool(after[cut].any()):
            return name
    return None


def _acting(slope: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Return at which positions of rows a loss acts; None for a slope of another shape."""
    if slope is None or slope.shape[:2] != shape:
        return None
    return slope.flatten(2).any(-1) if slope.dim() > 2 else slope != 0


def _is_confirmed(divergence: Divergence, read: ReadOutput) -> bool:
    """Return whether a label that no class has to be does not count where it changes places.

    All items of a class may be so certain that the loss asks nothing of them.
    """
    ignored = divergence.ignore_index
    if read.label is None or divergence.mask != read.label or ignored == IGNORE_INDEX:
        return True
    labels: Tensor = read.inputs[read.label]
    counted = labels[labels != ignored]
    if len(counted) == 0:
        return False
    swapped = torch.where(labels == counted[0], ignored, labels)
    swapped = torch.where(labels == ignored, counted[0], swapped)
    slope = read.slope_for({read.label: swapped})
    if slope is None:
        return False
    acts = slope.any(divergence.class_dim)
    acts = acts[:, -labels.shape[1] :] if divergence.is_tail else acts
    return torch.equal(divergence.counted({**read.inputs, read.label: swapped}, len(acts)), acts)


def _is_behind(labels: Tensor, items: torch.Size, acts: Tensor) -> bool:
    """Return whether a loss reads no position before as many last ones as there are labels."""
    if labels.dim() != 2 or len(items) != 2 or labels.shape[1] >= items[1]:
        return False
    return len(labels) == items[0] and not bool(acts[:, : -labels.shape[1]].any())


def _telling(
    divergence: Divergence, read: ReadOutput, labels: Tensor | None, acts: Tensor
) -> Iterator[Divergence]:
    """Yield the ways in which inputs of the items' shape may tell which of them count."""
    if labels is not None:
        out = labels[~acts].unique().tolist()
        # Of a loss that reads one position before the label, the last one never counts.
        for ignored in dict.fromkeys((IGNORE_INDEX, *out[:_MOST_LABELS])):
            yield replace(divergence, mask=read.label, ignore_index=ignored)
    for other, value in read.inputs.items():
        is_tensor = isinstance(value, Tensor) and value.shape == acts.shape
        if is_tensor and (value.dtype == torch.bool or other.endswith("mask")):
            yield replace(divergence, mask=other)
