"""What labels are that are as many as the logits: yes or no, numbers or shares of classes."""

import torch
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.integrations.transformers.likelihood.read_output import ReadOutput

# How near to a logit a label is put on either side of it.
_NEAR = 0.02


def kind_of_elements(read: ReadOutput, is_of_classes: bool | None) -> str | None:
    """Return what labels are that are as many as the logits: "labels", "numbers" or "shares".

    None where they are whole numbers of another kind. Where nobody knows whether the loss is one of
    classes, rows that sum to 1 are shares of classes.

    Args:
        read: The logits.
        is_of_classes: Whether the loss is one of classes; None where nobody knows.
    """
    assert read.label is not None
    logits, labels = read.logits, read.inputs[read.label]
    is_single = logits.dim() == 1 or logits.shape[-1] == 1
    is_whole = not is_single and not labels.is_floating_point()
    values = labels.float()
    sums = values.sum(-1)
    is_shares = not is_single and bool(torch.isclose(sums, torch.ones_like(sums)).all())
    if is_shares and is_of_classes is not False:
        return "shares"
    # Rows of shares that do not count may be all 0.
    if is_of_classes or _are_log_probabilities(logits):
        return None if is_whole else "shares"
    read_by_loss = labels != IGNORE_INDEX
    if read.slope is not None:
        # A mark of a missing label, as -1, is none of the labels.
        read_by_loss &= read.slope.reshape(labels.shape) != 0
    counted = values[read_by_loss]
    is_share = bool(((counted >= 0) & (counted <= 1)).all())
    if is_share and _are_chances(read, read_by_loss):
        return "labels"
    return None if is_whole and is_of_classes is None else "numbers"


def leaves_out_ignored(read: ReadOutput) -> bool:
    """Return whether a loss reads no number of the logits whose label is -100."""
    assert read.label is not None
    labels: Tensor = read.inputs[read.label]
    if not labels.is_floating_point():
        return True
    if read.slope is None:
        return False
    marked = labels.clone(memory_format=torch.contiguous_format)
    # One that the loss reads as it is.
    marked.view(-1)[read.slope.reshape(-1).abs().argmax()] = IGNORE_INDEX
    after = read.slope_for({read.label: marked})
    return after is not None and not bool(after.reshape(-1)[marked.view(-1) == IGNORE_INDEX].any())


def _are_chances(read: ReadOutput, counted: Tensor) -> bool:
    """Return whether labels from 0 to 1 are chances of a yes, not values that logits should have.

    The loss of a value turns where the label is the logit; that of a chance does so elsewhere, and
    where depends on the weight of a yes.

    Args:
        read: The logits.
        counted: Which labels the loss reads.
    """
    assert read.label is not None
    labels: Tensor = read.inputs[read.label]
    value = read.logits.detach().float().reshape(labels.shape)
    sides: list[Tensor] = []
    for moved in (value - _NEAR, value + _NEAR):
        near = moved.clamp(0, 1)
        if not labels.is_floating_point():
            near = near.floor() if not sides else near.ceil()
        asked = torch.where(counted, near.to(labels.dtype), labels)
        slope = read.slope_for({read.label: asked})
        if slope is None:
            return True
        sides.append(slope.float().reshape(labels.shape).sign())
    below, above = sides
    of_value = (value > 0) & (below > 0) | (value <= 0) & (below < 0)
    of_value &= (value < 1) & (above < 0) | (value >= 1) & (above > 0)
    telling = counted & ((below != 0) | (above != 0))
    if not labels.is_floating_point():
        # Between 0 and 1 both losses have the same signs at both of them.
        telling &= (value < 0) | (value > 1)
    agrees = of_value[telling]
    return bool(agrees.sum() * 2 <= len(agrees))


def _are_log_probabilities(logits: Tensor) -> bool:
    """Return whether every row is the logarithm of a distribution, whose own softmax it has."""
    if logits.dim() < 2 or logits.shape[-1] < 2:
        return False
    total = logits.float().logsumexp(-1)
    return bool((total.abs() < 1e-4).all())
