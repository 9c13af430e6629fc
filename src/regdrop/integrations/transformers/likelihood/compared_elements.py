"""What labels are that are as many as the logits: yes or no, numbers or shares of classes."""

import torch
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.integrations.transformers.likelihood.read_output import ReadOutput


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
    counted = values[labels != IGNORE_INDEX]
    is_share = bool(((counted >= 0) & (counted <= 1)).all())
    if is_share and _are_chances(read, labels):
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


def _are_chances(read: ReadOutput, labels: Tensor) -> bool:
    """Return whether labels from 0 to 1 are chances of a yes, not values that logits should have.

    The slope tells, where a label lies between a logit and its sigmoid.
    """
    assert read.label is not None
    value = read.logits.detach().float().reshape(labels.shape)
    between = ((value + value.sigmoid()) / 2).clamp(0, 1)
    if not labels.is_floating_point():
        between = between.round()
    asked = torch.where(labels == IGNORE_INDEX, labels, between.to(labels.dtype))
    slope = read.slope_if_taken({read.label: asked})
    if slope is None:
        return True
    slope, wanted = slope.float().reshape(labels.shape), asked.float()
    of_chance, of_value = (value.sigmoid() - wanted).sign(), (value - wanted).sign()
    telling = (of_chance != of_value) & (slope != 0) & (labels != IGNORE_INDEX)
    agrees = (slope.sign() == of_chance)[telling]
    return bool(agrees.sum() * 2 >= len(agrees))


def _are_log_probabilities(logits: Tensor) -> bool:
    """Return whether every row is the logarithm of a distribution, whose own softmax it has."""
    if logits.dim() < 2 or logits.shape[-1] < 2:
        return False
    total = logits.float().logsumexp(-1)
    return bool((total.abs() < 1e-4).all())
