"""How passes are compared beside a loss of somebody else's: its slope tells, and shapes.

Nothing of that loss is known but its value and its slope.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regdrop.heads import Head
from regdrop.integrations.transformers.forward.attempt import attempt
from regdrop.integrations.transformers.likelihood.class_dimension import (
    are_yes_or_no,
    find_class_dim,
)
from regdrop.integrations.transformers.likelihood.compared_elements import (
    kind_of_elements,
    leaves_out_ignored,
)
from regdrop.integrations.transformers.likelihood.compared_items import (
    divergence_of_items,
    obeyed_mask,
)
from regdrop.integrations.transformers.likelihood.divergence import Divergence
from regdrop.integrations.transformers.likelihood.read_output import (
    ReadOutput,
    SlopeOf,
    find_read_output,
)
from regdrop.integrations.transformers.outputs import find_logits
from regdrop.integrations.transformers.tolerances import are_close
from regdrop.passes import find_batch_size


def find_divergence(
    loss: Tensor,
    output: Any,
    inputs: Mapping[str, Any],
    label_names: Sequence[str],
    slope_of: SlopeOf,
) -> Divergence:
    """Return how the logits of an output are compared.

    Args:
        loss: The loss of the batch.
        output: What the model returned.
        inputs: The batch with its labels.
        label_names: Names that labels have.
        slope_of: The slope of the loss.

    Raises:
        ValueError: If the output holds nothing that could be logits, or the loss is none of classes
            and no labels tell what else is compared.
    """
    read = find_read_output(output, inputs, label_names, slope_of)
    key, logits, labels = read.key, read.logits, read.labels
    if _are_probabilities(logits):
        raise ValueError(
            f"the model's output {key!r} holds probabilities, which sum to 1, and the KL needs "
            "scores: return the logits, or override rdrop_head of the trainer with outputs that "
            "take their logarithm"
        )
    class_dim, is_of_classes = find_class_dim(read)
    if labels is not None and labels.numel() == logits.numel():
        found = kind_of_elements(read, is_of_classes)
        if found in ("labels", "numbers"):
            mask = obeyed_mask(read, labels.shape)
            # No yes or no and no whole number of a class is -100.
            ignores = found == "labels" or leaves_out_ignored(read)
            return Divergence(found, key, mask, label=read.label, ignores=ignores)
        if found == "shares":
            return Divergence("classes", key)
    if logits.dim() == 1 or logits.shape[-1] == 1:
        rows = find_batch_size(inputs)
        if rows % 2 == 0 and logits.numel() == rows and _are_pairs(logits, loss):
            return Divergence("margins", key)
        raise ValueError(
            f"the model's output {key!r} is one number a row, of shape {tuple(logits.shape)}, and "
            "no labels of that shape tell how passes are compared: override rdrop_head of the "
            "trainer to say what its divergence is"
        )
    if is_of_classes is False:
        got = "none" if labels is None else f"{read.label!r} of shape {tuple(labels.shape)}"
        raise ValueError(
            f"the loss is none of classes (its slope over the model's output {key!r}, of shape "
            f"{tuple(logits.shape)}, does not sum to 0), and labels of that shape, each a number "
            f"or a yes or no, tell what passes are compared by, got {got}: give label_names in the "
            "Trainer's arguments where the batch has such a tensor, or override rdrop_head of the "
            "trainer"
        )
    divergence = divergence_of_items(read, class_dim)
    if are_yes_or_no(read, class_dim):
        divergence = replace(divergence, kind="yes or no")
    return _without_strangers(divergence, read)


def fits_head(head: Head, output: Any, inputs: Mapping[str, Any], slope_of: SlopeOf) -> bool:
    """Return whether a head reads a batch and its output, and items where the loss does.

    Args:
        head: The head.
        output: What the model returned.
        inputs: The batch with its labels.
        slope_of: The slope of the loss.
    """
    rows = find_batch_size(inputs)
    if head.rows != rows:
        return False
    # Labels may be of another kind than the head's.
    terms = attempt(
        lambda: head.terms(head.outputs(output), head.target, num_passes=1), otherwise=None
    )
    if terms is None:
        return False
    try:
        key, logits = find_logits(output, rows)
    except ValueError:
        return True
    # A head counts the items that labels tell, and may not know of a mask.
    read = ReadOutput(inputs, None, key, logits, slope_of)
    return obeyed_mask(read, head.target.shape) is None


def _without_strangers(divergence: Divergence, read: ReadOutput) -> Divergence:
    """Leave out labels that name no class, as 255, which a later batch alone may hold."""
    labels = read.labels
    if labels is None or divergence.mask != read.label:
        return divergence
    num_classes = read.logits.shape[divergence.class_dim]
    known = (labels == divergence.ignore_index) | ((labels >= 0) & (labels < num_classes))
    return replace(divergence, num_classes=num_classes) if bool(known.all()) else divergence


def _are_probabilities(logits: Tensor) -> bool:
    """Return whether every row is a distribution over several classes, as behind a softmax."""
    if logits.dim() < 2 or logits.shape[-1] < 2 or not logits.is_floating_point():
        return False
    rows = logits.float()
    sums = rows.sum(-1)
    return bool((rows >= 0).all()) and bool(torch.isclose(sums, torch.ones_like(sums)).all())


def _are_pairs(logits: Tensor, loss: Tensor) -> bool:
    """Return whether a loss is that of pairs, their better rows first (Bradley and Terry)."""
    chosen, rejected = logits.flatten().float().chunk(2)
    return are_close(-F.logsigmoid(chosen - rejected).mean(), loss)
