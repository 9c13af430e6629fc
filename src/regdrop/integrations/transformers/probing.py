"""What the first batch tells of a loss that somebody else computes, and of the logits beside it.

What the loss is not known to be, a mean over rows or one that counts items, is tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.diagnostics import extra_pass
from regdrop.heads import Head
from regdrop.integrations.transformers.divergence import Divergence
from regdrop.integrations.transformers.evaluation import (
    evaluation_mode,
    shaken,
    training_without_dropout,
)
from regdrop.integrations.transformers.outputs import find_logits, find_tensor
from regdrop.integrations.transformers.own_loss import ComputeLoss, OwnLoss
from regdrop.passes import (
    copy_structure,
    find_batch_size,
    preserve_buffers,
    preserve_random_state,
    repeat_batch,
)

# A number of items that no batch has.
_SOME_ITEMS = 37.0


def probe_own_loss(
    model: nn.Module,
    compute: ComputeLoss,
    inputs: Mapping[str, Any],
    *,
    head: Head | None,
    label_names: Sequence[str],
    counts_items: bool | None,
) -> OwnLoss:
    """Try a loss on one batch, dropout off, to see what it is.

    Args:
        model: The unwrapped model.
        compute: The loss.
        inputs: A batch with its labels.
        head: The head of the batch where one is known.
        label_names: Names that labels have.
        counts_items: Whether the loss divides by the number of items that it is given; None to try.

    Raises:
        ValueError: If the output holds nothing that could be logits.
    """
    with evaluation_mode(model):
        trial = _try_loss(model, compute, inputs, counts_items)
        # A new head may score all rows alike, and there a loss of pairs is as good as one of rows.
        with shaken(model):
            other = _try_loss(model, compute, inputs, counts_items)
    counts_items = trial.counts_items or other.counts_items
    is_rowwise = trial.is_rowwise and other.is_rowwise
    if is_rowwise:
        with training_without_dropout(model):
            is_rowwise = _is_rowwise_in_training(model, compute, inputs, counts_items)
    divergence = None
    if head is None:
        rows = find_batch_size(inputs)
        divergence = _find_divergence(other.output, inputs, label_names, rows, other.loss)
        if divergence.mask not in (None, "attention_mask") and divergence.class_dim == -1:
            some = _SOME_ITEMS if counts_items else None
            is_shifted = _predicts_next(model, compute, inputs, some, divergence)
            divergence = replace(divergence, is_shifted=is_shifted)
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
    try:
        trials = [_try_loss(model, compute, inputs, counts_items) for _ in range(2)]
    except Exception:  # a loss may need what only a training step gives
        return True
    # Where two looks differ, chance acts that is no known dropout.
    return not _are_close(*(trial.loss for trial in trials)) or trials[0].is_rowwise


def _predicts_next(
    model: nn.Module,
    compute: ComputeLoss,
    inputs: Mapping[str, Any],
    num_items: float | None,
    divergence: Divergence,
) -> bool:
    """Return whether the logits that a loss depends on are those one before the labels."""
    rows = find_batch_size(inputs)
    valid = divergence.counted(inputs, rows)
    items = _on_device(num_items, inputs)
    with (
        evaluation_mode(model),
        preserve_random_state(),
        preserve_buffers(model),
        torch.enable_grad(),
    ):
        loss, output = compute(copy_structure(dict(inputs), clones=True), items)
        logits = find_tensor(output, divergence.logits)
        if valid.dim() < 2 or not (loss.requires_grad and logits.requires_grad):
            return False
        (slope,) = torch.autograd.grad(loss, logits, allow_unused=True)
    if slope is None:
        return False
    acts = slope.abs().sum(-1) > 0
    moved = replace(divergence, is_shifted=True).counted(inputs, rows)
    return torch.equal(acts, moved) and not torch.equal(acts, valid)


def _on_device(num_items: float | None, inputs: Mapping[str, Any]) -> Tensor | None:
    if num_items is None:
        return None
    device = next(v for v in inputs.values() if isinstance(v, Tensor)).device
    return torch.tensor(num_items, device=device)


def _are_close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b.to(a), rtol=1e-3, atol=1e-6, equal_nan=True))


def _find_divergence(
    output: Any, inputs: Mapping[str, Any], label_names: Sequence[str], rows: int, loss: Tensor
) -> Divergence:
    """Return how the logits of an output are compared, by their shape and that of the labels."""
    key, logits = find_logits(output, rows)
    if _are_probabilities(logits):
        raise ValueError(
            f"the model's output {key!r} holds probabilities, which sum to 1, and the KL needs "
            "scores: return the logits, or override rdrop_head of the trainer with outputs that "
            "take their logarithm"
        )
    name = next(
        (n for n in (*label_names, "labels", "label") if isinstance(inputs.get(n), Tensor)), None
    )
    labels = None if name is None else inputs[name]
    items = logits.shape[:-1] if logits.dim() > 1 else logits.shape
    is_single = logits.dim() == 1 or logits.shape[-1] == 1
    if (
        labels is not None
        and labels.numel() == logits.numel()
        and (is_single or labels.is_floating_point())
    ):
        values = labels.float()
        is_shares = (
            logits.dim() > 1
            and not is_single
            and bool(torch.isclose(values.sum(-1), values.new_ones(())).all())
        )
        if is_shares:
            return Divergence("classes", key)
        is_binary = bool(((values >= 0) & (values <= 1)).all())
        return Divergence("labels" if is_binary else "numbers", key, label=name)
    if is_single:
        if rows % 2 == 0 and logits.numel() == rows and _are_pairs(logits, loss):
            return Divergence("margins", key)
        raise ValueError(
            f"the model's output {key!r} is one number a row, of shape {tuple(logits.shape)}, and "
            "no labels of that shape tell how passes are compared: override rdrop_head of the "
            "trainer to say what its divergence is"
        )
    second = (len(logits), *logits.shape[2:]) if logits.dim() > 2 else None
    if labels is not None and not labels.is_floating_point() and labels.shape == second != items:
        return Divergence("classes", key, mask=name, class_dim=1)
    # Labels may be padded by one of themselves: then the attention mask tells.
    attention = inputs.get("attention_mask")
    is_attended = isinstance(attention, Tensor) and attention.shape == items
    if (
        labels is not None
        and not labels.is_floating_point()
        and labels.shape == items
        and not (is_attended and bool((labels != IGNORE_INDEX).all()))
    ):
        return Divergence("classes", key, mask=name)
    return Divergence("classes", key, mask="attention_mask" if is_attended else None)


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
