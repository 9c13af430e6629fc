"""Which output is compared over the passes, and how: shapes tell, and the slope of the loss.

It is the loss of somebody else, of which nothing but its value and its slope is known.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.heads import Head
from regdrop.integrations.transformers.evaluation import (
    find_labels,
    with_shorter_masks,
)
from regdrop.integrations.transformers.likelihood.divergence import Divergence
from regdrop.integrations.transformers.outputs import (
    Key,
    find_logits,
    find_tensor,
    named_tensors,
)
from regdrop.integrations.transformers.tolerances import are_close
from regdrop.passes import find_batch_size

# From a batch and the place of the logits to the loss's slope there; None where nobody knows.
SlopeOf = Callable[[Mapping[str, Any], Key], Tensor | None]

# The part of a loss's slope that may not cancel over the classes, where it is one of a softmax and
# has a small term of another kind, such as one on the normaliser. That of 10,000 numbers, each with
# a loss of its own, leaves as much by chance.
_SOFTMAX_TOLERANCE = 1e-2
# Labels that are tried as one that does not count.
_MOST_LABELS = 8


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
    rows = find_batch_size(inputs)
    name = next(iter(find_labels(inputs, label_names)), None)
    labels = None if name is None else inputs[name]
    key, logits, slope = _find_read(output, rows, labels, partial(slope_of, inputs))
    if _are_probabilities(logits):
        raise ValueError(
            f"the model's output {key!r} holds probabilities, which sum to 1, and the KL needs "
            "scores: return the logits, or override rdrop_head of the trainer with outputs that "
            "take their logarithm"
        )
    is_single = logits.dim() == 1 or logits.shape[-1] == 1
    class_dim, is_of_classes = _find_class_dim(logits, labels, slope)
    is_whole = labels is not None and not labels.is_floating_point()
    is_of_elements = labels is not None and labels.numel() == logits.numel()
    if name is not None and is_whole and is_of_classes is False and not is_of_elements:
        class_dim, is_of_classes = _class_dim_by_labels(name, inputs, logits, key, slope_of)
    if name is not None and labels is not None and is_of_elements:
        found = _of_elements(name, inputs, logits, key, slope_of, is_of_classes)
        if found in ("labels", "numbers"):
            mask = _obeyed_mask(inputs, labels.shape, key, slope_of)
            # No yes or no and no whole number of a class is -100.
            ignores = found == "labels" or _leaves_out(name, inputs, key, slope, slope_of)
            return Divergence(found, key, mask, label=name, ignores=ignores)
        if found == "shares":
            return Divergence("classes", key)
    if is_single:
        if rows % 2 == 0 and logits.numel() == rows and _are_pairs(logits, loss):
            return Divergence("margins", key)
        raise ValueError(
            f"the model's output {key!r} is one number a row, of shape {tuple(logits.shape)}, and "
            "no labels of that shape tell how passes are compared: override rdrop_head of the "
            "trainer to say what its divergence is"
        )
    if is_of_classes is False:
        got = "none" if labels is None else f"{name!r} of shape {tuple(labels.shape)}"
        raise ValueError(
            f"the loss is none of classes (its slope over the model's output {key!r}, of shape "
            f"{tuple(logits.shape)}, does not sum to 0), and labels of that shape, each a number "
            f"or a yes or no, tell what passes are compared by, got {got}: give label_names in the "
            "Trainer's arguments where the batch has such a tensor, or override rdrop_head of the "
            "trainer"
        )
    divergence = _of_items(name, inputs, logits, class_dim, key, slope, slope_of)
    if labels is None or divergence.mask != name:
        return divergence
    # A later batch may hold a label that names no class, as 255, where the first has none.
    num_classes = logits.shape[class_dim]
    known = (labels == divergence.ignore_index) | ((labels >= 0) & (labels < num_classes))
    return replace(divergence, num_classes=num_classes) if bool(known.all()) else divergence


def _find_read(
    output: Any, rows: int, labels: Tensor | None, slope_at: Callable[[Key], Tensor | None]
) -> tuple[Key, Tensor, Tensor | None]:
    """Return the logits that a loss reads, with their name and its slope there.

    Raises:
        ValueError: If nothing could be logits, or it reads none of those that are called so.
    """
    try:
        key, logits = find_logits(output, rows)
    except ValueError as error:
        if labels is None:
            raise ValueError(f"{error}; or give label_names in the Trainer's arguments") from error
        alike = [(k, x) for k, x in named_tensors(output) if x.shape == labels.shape]
        if len(alike) != 1 or not alike[0][1].is_floating_point():
            raise
        [(key, logits)] = alike
    if logits.shape[:1] != (rows,):
        raise ValueError(
            f"the model's output {key!r} must have the {rows} rows of the batch as its first "
            f"dimension, to be compared between passes, got shape {tuple(logits.shape)}: return it "
            "so, or override rdrop_head of the trainer"
        )
    called = [other for other, _ in named_tensors(output) if "logits" in str(other)]
    for other in dict.fromkeys((key, *called)):
        found = find_tensor(output, other)
        if not found.is_floating_point() or found.shape[:1] != (rows,):
            continue
        slope = slope_at(other)
        if slope is None and other == key:
            return key, logits, None
        if slope is not None and bool(slope.any()):
            return other, found, slope
    raise ValueError(
        f"the loss does not depend on the model's output {key!r}, of shape {tuple(logits.shape)}, "
        "so that nothing tells what passes are compared by: return the scores that it reads under "
        "the name logits, or override rdrop_head of the trainer to say what its divergence is"
    )


def _find_class_dim(
    logits: Tensor, labels: Tensor | None, slope: Tensor | None
) -> tuple[int, bool | None]:
    """Return the dimension of the classes, and whether the loss is one of classes.

    None where nobody knows.
    """
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
    fitting = [dim for dim in dims if _is_of_classes(slope, dim)]
    return (fitting[0], True) if fitting else (dims[0], False)


def _class_dim_by_labels(
    name: str, inputs: Mapping[str, Any], logits: Tensor, key: Key, slope_of: SlopeOf
) -> tuple[int, bool | None]:
    """Return the dimension of the classes by what the slope is for other labels.

    Terms that read no label, as of a teacher, or one on the logits' size, are in both slopes.
    """
    labels: Tensor = inputs[name]
    dims = (-1,) if logits.dim() == 2 else (-1, 1)
    # Those that are there, in other places: others may be none that the loss knows.
    counted = (labels >= 0) & (labels < max(logits.shape[dim] for dim in dims))
    moved = labels.masked_scatter(counted, labels[counted].roll(1))
    before, after = slope_of(inputs, key), slope_of({**inputs, name: moved}, key)
    if before is None or after is None or torch.equal(before, after):
        return dims[0], None
    fitting = [dim for dim in dims if _is_of_classes(after - before, dim)]
    return (fitting[0], True) if fitting else (dims[0], False)


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
    try:
        head.terms(head.outputs(output), head.target, num_passes=1)
    except (ValueError, TypeError, RuntimeError):  # labels of another kind than the head's
        return False
    try:
        key, _ = find_logits(output, rows)
    except ValueError:
        return True
    # A head counts the items that labels tell, and may not know of a mask.
    return _obeyed_mask(inputs, head.target.shape, key, slope_of) is None


def _obeyed_mask(
    inputs: Mapping[str, Any], shape: torch.Size, key: Key, slope_of: SlopeOf
) -> str | None:
    """Return the name of a mask of the items' shape without which a loss reads no logits."""
    before: Tensor | None = None
    for name, batch in with_shorter_masks(inputs, shape):
        before = _acting(slope_of(inputs, key), shape) if before is None else before
        try:
            after = _acting(slope_of(batch, key), shape)
        except Exception:  # whatever a model raises for a mask that it cannot have
            continue
        if before is None or after is None:
            continue
        cut = inputs[name] != batch[name]
        if bool(before[cut].any()) and not bool(after[cut].any()):
            return name
    return None


def _acting(slope: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Return at which positions of rows a loss acts; None for a slope of another shape."""
    if slope is None or slope.shape[:2] != shape:
        return None
    return slope.flatten(2).any(-1) if slope.dim() > 2 else slope != 0


def _is_of_classes(slope: Tensor, class_dim: int) -> bool:
    """Return whether a loss has the slope of one of a softmax: its sum over the classes is 0.

    Where each row is scored against the others of its batch, columns may be classes too.
    """
    slope = slope.float()
    is_square = slope.dim() == 2 and slope.shape[0] == slope.shape[1]
    sums = slope.sum() if is_square else slope.sum(class_dim)
    return bool(sums.abs().sum() <= _SOFTMAX_TOLERANCE * slope.abs().sum())


def _of_elements(
    name: str,
    inputs: Mapping[str, Any],
    logits: Tensor,
    key: Key,
    slope_of: SlopeOf,
    is_of_classes: bool | None,
) -> str | None:
    """Return what labels are that are as many as the logits: "labels", "numbers" or "shares".

    None where they are whole numbers of another kind. Where nobody knows whether the loss is one of
    classes, rows that sum to 1 are shares of classes.
    """
    labels: Tensor = inputs[name]
    is_single = logits.dim() == 1 or logits.shape[-1] == 1
    is_whole = not is_single and not labels.is_floating_point()
    values = labels.float()
    sums = values.sum(-1)
    is_shares = not is_single and bool(torch.isclose(sums, torch.ones_like(sums)).all())
    if is_shares and is_of_classes is not False:
        return "shares"
    if _are_log_probabilities(logits):
        return None if is_whole else "shares"
    if is_of_classes:
        # Rows of shares that do not count may be all 0.
        return None if is_whole else "shares"
    counted = values[labels != IGNORE_INDEX]
    is_share = bool(((counted >= 0) & (counted <= 1)).all())
    if is_share and _are_chances(name, inputs, logits, key, slope_of):
        return "labels"
    return None if is_whole and is_of_classes is None else "numbers"


def _are_chances(
    name: str, inputs: Mapping[str, Any], logits: Tensor, key: Key, slope_of: SlopeOf
) -> bool:
    """Return whether labels from 0 to 1 are chances of a yes, not values that logits should have.

    The slope tells, where a label lies between a logit and its sigmoid.
    """
    labels: Tensor = inputs[name]
    value = logits.detach().float().reshape(labels.shape)
    between = ((value + value.sigmoid()) / 2).clamp(0, 1)
    if not labels.is_floating_point():
        between = between.round()
    asked = torch.where(labels == IGNORE_INDEX, labels, between.to(labels.dtype))
    try:
        slope = slope_of({**inputs, name: asked}, key)
    except Exception:  # whatever a loss raises for labels that it cannot have
        return True
    if slope is None:
        return True
    slope, wanted = slope.float().reshape(labels.shape), asked.float()
    of_chance, of_value = (value.sigmoid() - wanted).sign(), (value - wanted).sign()
    telling = (of_chance != of_value) & (slope != 0) & (labels != IGNORE_INDEX)
    agrees = (slope.sign() == of_chance)[telling]
    return bool(agrees.sum() * 2 >= len(agrees))


def _leaves_out(
    name: str, inputs: Mapping[str, Any], key: Key, slope: Tensor | None, slope_of: SlopeOf
) -> bool:
    """Return whether a loss reads no number of the logits whose label is -100."""
    labels: Tensor = inputs[name]
    if not labels.is_floating_point():
        return True
    if slope is None:
        return False
    marked = labels.clone(memory_format=torch.contiguous_format)
    # One that the loss reads as it is.
    marked.view(-1)[slope.reshape(-1).abs().argmax()] = IGNORE_INDEX
    after = slope_of({**inputs, name: marked}, key)
    return after is not None and not bool(after.reshape(-1)[marked.view(-1) == IGNORE_INDEX].any())


def _of_items(
    name: str | None,
    inputs: Mapping[str, Any],
    logits: Tensor,
    class_dim: int,
    key: Key,
    slope: Tensor | None,
    slope_of: SlopeOf,
) -> Divergence:
    """Return the KL of classes, over the items that the loss reads.

    They are those that labels tell, or a mask of the items' shape.
    """
    found = Divergence("classes", key, class_dim=class_dim)
    items = logits.movedim(class_dim, -1).shape[:-1]
    acts = None if slope is None else slope.any(class_dim)
    labels: Tensor | None = None if name is None else inputs[name]
    if labels is not None and (labels.is_floating_point() or labels.dim() != len(items)):
        labels = None
    if acts is not None and labels is not None and _is_behind(labels, items, acts):
        acts, found = acts[:, -labels.shape[1] :], replace(found, is_tail=True)
        items = acts.shape
    if labels is not None and labels.shape != items:
        labels = None
    if acts is not None and len(items) > 1 and not bool(acts.all()):
        for other in _telling(found, name if labels is not None else None, inputs, acts):
            for is_shifted in (False, True):
                moved = replace(other, is_shifted=is_shifted)
                if not torch.equal(moved.counted(inputs, len(acts)), acts):
                    continue
                if _is_confirmed(moved, name, inputs, key, slope_of):
                    return moved
    if labels is not None and bool((labels == IGNORE_INDEX).any()):
        return replace(found, mask=name)
    # Labels may be padded by one of themselves: then a mask tells.
    obeyed = _obeyed_mask(inputs, items, key, slope_of) if class_dim == -1 else None
    attention = inputs.get("attention_mask")
    if obeyed is None and isinstance(attention, Tensor) and attention.shape == items:
        obeyed = "attention_mask"
    return replace(found, mask=obeyed or (None if labels is None else name))


def _is_confirmed(
    divergence: Divergence,
    name: str | None,
    inputs: Mapping[str, Any],
    key: Key,
    slope_of: SlopeOf,
) -> bool:
    """Return whether a label that no class has to be does not count where it changes places.

    All items of a class may be so certain that the loss asks nothing of them.
    """
    ignored = divergence.ignore_index
    if name is None or divergence.mask != name or ignored == IGNORE_INDEX:
        return True
    labels: Tensor = inputs[name]
    counted = labels[labels != ignored]
    if len(counted) == 0:
        return False
    swapped = torch.where(labels == counted[0], ignored, labels)
    swapped = torch.where(labels == ignored, counted[0], swapped)
    changed = {**inputs, name: swapped}
    try:
        slope = slope_of(changed, key)
    except Exception:  # whatever a loss raises for labels that it cannot have
        return False
    if slope is None:
        return False
    acts = slope.any(divergence.class_dim)
    acts = acts[:, -labels.shape[1] :] if divergence.is_tail else acts
    return torch.equal(divergence.counted(changed, len(acts)), acts)


def _is_behind(labels: Tensor, items: torch.Size, acts: Tensor) -> bool:
    """Return whether a loss reads no position before as many last ones as there are labels."""
    if labels.dim() != 2 or len(items) != 2 or labels.shape[1] >= items[1]:
        return False
    return len(labels) == items[0] and not bool(acts[:, : -labels.shape[1]].any())


def _telling(
    divergence: Divergence, name: str | None, inputs: Mapping[str, Any], acts: Tensor
) -> Iterator[Divergence]:
    """Yield the ways in which inputs of the items' shape may tell which of them count."""
    if name is not None:
        labels: Tensor = inputs[name]
        out = labels[~acts].unique().tolist()
        # Of a loss that reads one position before the label, the last one never counts.
        for ignored in dict.fromkeys((IGNORE_INDEX, *out[:_MOST_LABELS])):
            yield replace(divergence, mask=name, ignore_index=ignored)
    for other, value in inputs.items():
        is_tensor = isinstance(value, Tensor) and value.shape == acts.shape
        if is_tensor and (value.dtype == torch.bool or other.endswith("mask")):
            yield replace(divergence, mask=other)


def _are_log_probabilities(logits: Tensor) -> bool:
    """Return whether every row is the logarithm of a distribution, whose own softmax it has."""
    if logits.dim() < 2 or logits.shape[-1] < 2:
        return False
    total = logits.float().logsumexp(-1)
    return bool((total.abs() < 1e-4).all())


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
