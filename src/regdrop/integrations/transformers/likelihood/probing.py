"""What the first batch tells of a loss that somebody else computes, and of the logits beside it.

What the loss is not known to be, a mean over rows or one that counts items, is tried.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.diagnostics import extra_pass
from regdrop.heads import Head
from regdrop.integrations.transformers.evaluation import (
    evaluation_mode,
    find_labels,
    shaken,
    training_without_dropout,
    with_shorter_masks,
)
from regdrop.integrations.transformers.likelihood.divergence import Divergence
from regdrop.integrations.transformers.likelihood.own_loss import ComputeLoss, OwnLoss
from regdrop.integrations.transformers.outputs import Key, find_logits, find_tensor
from regdrop.integrations.transformers.tolerances import FORWARD
from regdrop.passes import (
    copy_structure,
    find_batch_size,
    find_tensors,
    preserve_buffers,
    preserve_random_state,
    repeat_batch,
)

# A number of items that no batch has.
_SOME_ITEMS = 37.0
# The part of a loss's slope that may not cancel over the classes, where it is one of a softmax and
# has a small term of another kind, such as one on the normaliser. That of 10,000 numbers, each with
# a loss of its own, leaves as much by chance.
_SOFTMAX_TOLERANCE = 1e-2


def probe_own_loss(
    model: nn.Module,
    compute: ComputeLoss,
    inputs: Mapping[str, Any],
    *,
    head: Head | None,
    label_names: Sequence[str],
    counts_items: bool | None,
    is_given: bool = False,
    asks_slope: bool = True,
) -> OwnLoss:
    """Try a loss on one batch, dropout off, to see what it is.

    Args:
        model: The unwrapped model.
        compute: The loss.
        inputs: A batch with its labels.
        head: The head of the batch where one is known.
        label_names: Names that labels have.
        counts_items: Whether the loss divides by the number of items that it is given; None to try.
        is_given: Whether somebody gave that head; else the batch and the loss may contradict it.
        asks_slope: Whether the slope of the loss is asked too: parameters that are spread over
            processes are not whole again after a part of a backward. Without it shapes tell.

    Raises:
        ValueError: If the output holds nothing that could be logits, or the loss is none of classes
            and no labels tell what else is compared.
    """
    divergence = None
    with evaluation_mode(model):
        trial = _try_loss(model, compute, inputs, counts_items)
        # A new head may score all rows alike, and there a loss of pairs is as good as one of rows.
        with shaken(model):
            other = _try_loss(model, compute, inputs, counts_items)
            counts_items = trial.counts_items or other.counts_items
            some = _SOME_ITEMS if counts_items else None
            slope_of = partial(_slope, model, compute, some) if asks_slope else _no_slope
            if not is_given and head is not None and not _fits(head, other, inputs, slope_of):
                head = None
            if head is None:
                divergence = _find_divergence(other, inputs, label_names, slope_of)
    is_rowwise = trial.is_rowwise and other.is_rowwise
    if is_rowwise:
        with training_without_dropout(model):
            is_rowwise = _is_rowwise_in_training(model, compute, inputs, counts_items)
    return OwnLoss(counts_items, is_rowwise, divergence)


class _Trial(NamedTuple):
    """What one batch told of a loss, dropout off."""

    counts_items: bool
    is_rowwise: bool
    loss: Tensor
    output: Any


def _try_loss(
    model: nn.Module, compute: ComputeLoss, inputs: Mapping[str, Any], counts_items: bool | None
) -> _Trial:
    def look(batch: Mapping[str, Any], num_items: float | None) -> tuple[Tensor, Any]:
        items = _on_device(num_items, inputs)
        return extra_pass(model, lambda own: compute(own, items), dict(batch))

    if counts_items is None:
        # Only a divisor makes twice as many half the loss.
        losses = [look(inputs, items)[0] for items in (_SOME_ITEMS, 2 * _SOME_ITEMS)]
        counts_items = not _are_close(*losses)
    some = _SOME_ITEMS if counts_items else None
    loss, output = look(inputs, some)
    try:
        stacked, _ = look(repeat_batch(dict(inputs)), None if some is None else 2 * some)
        is_rowwise = _are_close(stacked, loss)
    except Exception:  # whatever a model raises for rows that do not fit together
        is_rowwise = False
    return _Trial(counts_items, is_rowwise, loss, output)


def _is_rowwise_in_training(
    model: nn.Module, compute: ComputeLoss, inputs: Mapping[str, Any], counts_items: bool
) -> bool:
    """Return whether a loss is one of rows in training mode too, as far as can be told."""
    some = _SOME_ITEMS if counts_items else None

    def look_twice(batch: dict[str, Any]) -> list[Tensor]:
        losses = []
        for _ in range(2):
            # Chance goes on from look to look, and nothing else does.
            with preserve_buffers(model):
                own = copy_structure(batch, clones=True)
                losses.append(compute(own, _on_device(some, inputs))[0])
        return losses

    try:
        once, again = extra_pass(model, look_twice, dict(inputs))
        # Where two looks differ, chance acts that is no known dropout.
        if not _are_close(once, again):
            return True
        return _try_loss(model, compute, inputs, counts_items).is_rowwise
    except Exception:  # a loss may need what only a training step gives
        return True


# From a batch and the place of the logits to the loss's slope there.
_SlopeOf = Callable[[Mapping[str, Any], Key], Tensor | None]


def _slope(
    model: nn.Module,
    compute: ComputeLoss,
    num_items: float | None,
    inputs: Mapping[str, Any],
    key: Key,
) -> Tensor | None:
    """Return the derivative of a loss with respect to the logits.

    None if it does not act there, or a part of the model knows a whole backward alone.
    """
    items = _on_device(num_items, inputs)
    with preserve_random_state(), preserve_buffers(model), torch.enable_grad():
        loss, output = compute(copy_structure(dict(inputs), clones=True), items)
        logits = find_tensor(output, key)
        if not (loss.requires_grad and logits.requires_grad):
            return None
        try:
            (slope,) = torch.autograd.grad(loss, logits, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # as that of a reentrant checkpoint
            return None
    return slope if slope is not None and bool(slope.any()) else None


def _no_slope(inputs: Mapping[str, Any], key: Key) -> None:
    return None


def _fits(head: Head, trial: _Trial, inputs: Mapping[str, Any], slope_of: _SlopeOf) -> bool:
    """Return whether a head reads the batch and the output, and items where the loss does."""
    rows = find_batch_size(inputs)
    if head.rows != rows:
        return False
    try:
        head.terms(head.outputs(trial.output), head.target, num_passes=1)
    except (ValueError, TypeError, RuntimeError):  # labels of another kind than the head's
        return False
    try:
        key, _ = find_logits(trial.output, rows)
    except ValueError:
        return True
    # A head counts the items that labels tell, and may not know of a mask.
    return _obeyed_mask(inputs, head.target.shape, key, slope_of) is None


def _obeyed_mask(
    inputs: Mapping[str, Any], shape: torch.Size, key: Key, slope_of: _SlopeOf
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


def _on_device(num_items: float | None, inputs: Mapping[str, Any]) -> Tensor | None:
    if num_items is None:
        return None
    return torch.tensor(num_items, device=next(find_tensors(inputs)).device)


def _are_close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b.to(a), rtol=FORWARD.single, atol=1e-6, equal_nan=True))


def _find_divergence(
    trial: _Trial, inputs: Mapping[str, Any], label_names: Sequence[str], slope_of: _SlopeOf
) -> Divergence:
    """Return how the logits of an output are compared.

    Their shape and that of the labels tell, and whether the loss's slope is that of classes.
    """
    rows = find_batch_size(inputs)
    key, logits = find_logits(trial.output, rows)
    if _are_probabilities(logits):
        raise ValueError(
            f"the model's output {key!r} holds probabilities, which sum to 1, and the KL needs "
            "scores: return the logits, or override rdrop_head of the trainer with outputs that "
            "take their logarithm"
        )
    name = next(iter(find_labels(inputs, label_names)), None)
    labels = None if name is None else inputs[name]
    items = logits.shape[:-1] if logits.dim() > 1 else logits.shape
    is_single = logits.dim() == 1 or logits.shape[-1] == 1
    second = (len(logits), *logits.shape[2:]) if logits.dim() > 2 else None
    is_second = labels is not None and labels.shape == second != items
    slope = None if is_single else slope_of(inputs, key)
    is_of_classes = None if slope is None else _is_of_classes(slope, 1 if is_second else -1)
    if name is not None and labels is not None and labels.numel() == logits.numel():
        found = _of_elements(labels, logits, is_of_classes)
        if found in ("labels", "numbers"):
            mask = _obeyed_mask(inputs, labels.shape, key, slope_of)
            # No yes or no and no whole number of a class is -100.
            ignores = found == "labels" or _leaves_out(name, inputs, key, slope_of)
            return Divergence(found, key, mask, label=name, ignores=ignores)
        if found == "shares":
            return Divergence("classes", key)
    if is_single:
        if rows % 2 == 0 and logits.numel() == rows and _are_pairs(logits, trial.loss):
            return Divergence("margins", key)
        raise ValueError(
            f"the model's output {key!r} is one number a row, of shape {tuple(logits.shape)}, and "
            "no labels of that shape tell how passes are compared: override rdrop_head of the "
            "trainer to say what its divergence is"
        )
    are_numbers = labels is None or labels.is_floating_point()
    if are_numbers and is_of_classes is False:
        got = "none" if labels is None else f"{name!r} of shape {tuple(labels.shape)}"
        raise ValueError(
            f"the loss is none of classes (its slope over the model's output {key!r}, of shape "
            f"{tuple(logits.shape)}, does not sum to 0), and labels of that shape, each a number "
            f"or a yes or no, tell what passes are compared by, got {got}: give label_names in the "
            "Trainer's arguments, or override rdrop_head of the trainer"
        )
    if labels is not None and not labels.is_floating_point() and is_second:
        return Divergence("classes", key, mask=name, class_dim=1)
    divergence = Divergence("classes", key, mask=_find_mask(name, inputs, items, key, slope_of))
    return replace(divergence, is_shifted=_predicts_next(slope, divergence, inputs, rows))


def _of_elements(labels: Tensor, logits: Tensor, is_of_classes: bool | None) -> str | None:
    """Return what labels are that are as many as the logits: "labels", "numbers" or "shares".

    None where they are whole numbers of another kind. Where nobody knows whether the loss is one of
    classes, rows that sum to 1 are shares of classes.
    """
    is_single = logits.dim() == 1 or logits.shape[-1] == 1
    is_whole = not is_single and not labels.is_floating_point()
    values = labels.float()
    sums = values.sum(-1)
    is_shares = not is_single and bool(torch.isclose(sums, torch.ones_like(sums)).all())
    if is_shares and is_of_classes is not False:
        return "shares"
    if is_of_classes:
        # Rows of shares that do not count may be all 0.
        return None if is_whole else "shares"
    counted = values[labels != IGNORE_INDEX]
    if bool(((counted >= 0) & (counted <= 1)).all()):
        return "labels"
    return None if is_whole and is_of_classes is None else "numbers"


def _leaves_out(name: str, inputs: Mapping[str, Any], key: Key, slope_of: _SlopeOf) -> bool:
    """Return whether a loss reads no number of the logits whose label is -100."""
    labels: Tensor = inputs[name]
    if not labels.is_floating_point():
        return True
    marked = labels.clone(memory_format=torch.contiguous_format)
    marked.view(-1)[0] = IGNORE_INDEX
    slope = slope_of({**inputs, name: marked}, key)
    return slope is not None and not bool(slope.reshape(-1)[marked.view(-1) == IGNORE_INDEX].any())


def _find_mask(
    name: str | None, inputs: Mapping[str, Any], items: torch.Size, key: Key, slope_of: _SlopeOf
) -> str | None:
    """Return the input that tells which items count: labels, or a mask of the items' shape."""
    labels: Tensor | None = None if name is None else inputs[name]
    if labels is not None and (labels.is_floating_point() or labels.shape != items):
        labels = None
    if labels is not None and bool((labels == IGNORE_INDEX).any()):
        return name
    # Labels may be padded by one of themselves: then a mask tells.
    obeyed = _obeyed_mask(inputs, items, key, slope_of)
    if obeyed is not None:
        return obeyed
    attention = inputs.get("attention_mask")
    if isinstance(attention, Tensor) and attention.shape == items:
        return "attention_mask"
    return None if labels is None else name


def _predicts_next(
    slope: Tensor | None, divergence: Divergence, inputs: Mapping[str, Any], rows: int
) -> bool:
    """Return whether the logits that a loss depends on are those one before the labels."""
    valid = divergence.counted(inputs, rows)
    if slope is None or divergence.mask is None or valid.dim() < 2:
        return False
    acts = slope.any(-1)
    moved = replace(divergence, is_shifted=True).counted(inputs, rows)
    return torch.equal(acts, moved) and not torch.equal(acts, valid)


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
    return _are_close(-F.logsigmoid(chosen - rejected).mean(), loss)
