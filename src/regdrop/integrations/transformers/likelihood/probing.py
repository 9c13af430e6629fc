"""What the first batch tells of a loss that somebody else computes, and of the logits beside it.

What the loss is not known to be, a mean over rows or one that counts items, is tried.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from regdrop.diagnostics import extra_pass
from regdrop.heads import Head
from regdrop.integrations.transformers.evaluation import (
    evaluation_mode,
    find_labels,
    shaken,
    training_without_dropout,
)
from regdrop.integrations.transformers.likelihood.compared_outputs import (
    find_divergence,
    fits_head,
)
from regdrop.integrations.transformers.likelihood.own_loss import ComputeLoss, OwnLoss
from regdrop.integrations.transformers.outputs import Key, find_logits, find_tensor
from regdrop.integrations.transformers.tolerances import FORWARD, are_close
from regdrop.passes import (
    copy_structure,
    find_batch_size,
    find_tensors,
    preserve_buffers,
    preserve_random_state,
    repeat_batch,
)

# From a batch, its number of items and the place of the logits to the loss's slope there.
SlopeIn = Callable[[Mapping[str, Any], float | None, Key], Tensor | None]

# What autograd calls the making of the same numbers in the same order.
_COPIES = {
    f"{name}Backward"
    for name in (
        "Alias",
        "Clone",
        "ReshapeAlias",
        "Squeeze",
        "ToCopy",
        "UnsafeView",
        "Unsqueeze",
        "View",
    )
}
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
        trial = _try_loss(model, compute, inputs, label_names, counts_items)
        # A new head may score all rows alike, and there a loss of pairs is as good as one of rows.
        with shaken(model):
            other = _try_loss(model, compute, inputs, label_names, counts_items)
            counts_items = trial.counts_items or other.counts_items
            some = _SOME_ITEMS if counts_items else None
            slope_in = partial(_slope, model, compute) if asks_slope else _no_slope
            slope_of = partial(_slope_of, slope_in, some)
            is_rowwise = _is_slope_rowwise(
                slope_in, inputs, label_names, counts_items, other.output
            )
            is_fit = is_given or head is None or fits_head(head, other.output, inputs, slope_of)
            if head is None or not is_fit:
                divergence = find_divergence(
                    other.loss, other.output, inputs, label_names, slope_of
                )
    is_rowwise, note = is_rowwise and trial.is_rowwise and other.is_rowwise, None
    with training_without_dropout(model):
        found = _try_in_training(model, compute, inputs, label_names, counts_items)
    if found is not None:
        is_rowwise, note = is_rowwise and found.is_rowwise, found.note
    return OwnLoss(counts_items, is_rowwise, divergence, note)


class _Trial(NamedTuple):
    """What one batch told of a loss, dropout off."""

    counts_items: bool
    is_rowwise: bool
    loss: Tensor
    output: Any


def _try_loss(
    model: nn.Module,
    compute: ComputeLoss,
    inputs: Mapping[str, Any],
    label_names: Sequence[str],
    counts_items: bool | None,
) -> _Trial:
    def look(batch: Mapping[str, Any], num_items: float | None) -> tuple[Tensor, Any]:
        items = _on_device(num_items, inputs)
        return extra_pass(model, lambda own: compute(own, items), dict(batch))

    if counts_items is None:
        # Only a divisor makes twice as many half the loss.
        losses = [look(inputs, items)[0] for items in (_SOME_ITEMS, 2 * _SOME_ITEMS)]
        counts_items = not are_close(*losses)
    some, twice = (_SOME_ITEMS, 2 * _SOME_ITEMS) if counts_items else (None, None)
    loss, output = look(inputs, some)
    try:
        is_rowwise = are_close(look(repeat_batch(dict(inputs)), twice)[0], loss)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model raises for rows that do not fit together
        return _Trial(counts_items, False, loss, output)
    # Passes are not the same: a correlation is that of its rows only while they are.
    moved, stacked = _moved_passes(inputs, label_names, 1)
    try:
        mean = (loss + look(moved, some)[0]) / 2
        is_rowwise = is_rowwise and are_close(look(stacked, twice)[0], mean)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what belongs to a row may be elsewhere too
        pass
    return _Trial(counts_items, is_rowwise, loss, output)


def _moved_passes(
    inputs: Mapping[str, Any], label_names: Sequence[str], shift: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a batch whose rows are moved on against their labels; and both batches, stacked.

    Masks stay with the labels, so that as many items count as before.
    """
    rows, labels = find_batch_size(inputs), find_labels(inputs, label_names)
    moved = {
        name: value.roll(shift, 0)
        for name, value in inputs.items()
        if isinstance(value, Tensor)
        and value.shape[:1] == (rows,)
        and name not in labels
        and not name.endswith("mask")
    }
    stacked = {name: torch.cat([inputs[name], value]) for name, value in moved.items()}
    return {**inputs, **moved}, {**repeat_batch(dict(inputs)), **stacked}


def _is_slope_rowwise(
    slope_in: SlopeIn,
    inputs: Mapping[str, Any],
    label_names: Sequence[str],
    counts_items: bool,
    output: Any,
) -> bool:
    """Return whether what a loss asks of a row depends on it alone, as far as can be told.

    The root of a mean is so near to a mean over rows that its value does not tell.
    """
    some, twice = (_SOME_ITEMS, 2 * _SOME_ITEMS) if counts_items else (None, None)
    rows = find_batch_size(inputs)
    try:
        key, _ = find_logits(output, rows)
        alone = slope_in(inputs, some, key)
        # The rows that a loss chooses may be the same by chance.
        for shift in {1, rows // 2}:
            _, stacked = _moved_passes(inputs, label_names, shift)
            beside = slope_in(stacked, twice, key)
            if alone is None or beside is None or len(beside) != 2 * len(alone):
                return True
            difference = (2 * beside[: len(alone)] - alone).abs().sum()
            if difference > FORWARD.of(alone.dtype) * alone.abs().sum():
                return False
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model raises for rows that do not fit together
        return True
    return True


class _TrainingTrial(NamedTuple):
    """What one batch told of a loss in training mode, without the dropout that is known."""

    is_rowwise: bool
    note: str | None


def _try_in_training(
    model: nn.Module,
    compute: ComputeLoss,
    inputs: Mapping[str, Any],
    label_names: Sequence[str],
    counts_items: bool,
) -> _TrainingTrial | None:
    """Look at a loss in training mode; None where it needs what only a training step gives."""
    some = _SOME_ITEMS if counts_items else None

    def look_twice(batch: dict[str, Any]) -> list[tuple[Tensor, list[list[Tensor]]]]:
        found = []
        for _ in range(2):
            # Chance goes on from look to look, and nothing else does.
            with preserve_buffers(model), _recorded_calls(model) as calls:
                own = copy_structure(batch, clones=True)
                found.append((compute(own, _on_device(some, inputs))[0], calls))
        return found

    try:
        (once, calls), (again, further) = extra_pass(model, look_twice, dict(inputs))
        note = _note_of_calls(calls, further)
        # Where two looks differ, chance acts that is no known dropout.
        if not are_close(once, again):
            return _TrainingTrial(True, note)
        trial = _try_loss(model, compute, inputs, label_names, counts_items)
        return _TrainingTrial(trial.is_rowwise, note)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a loss may need what only a training step gives
        return None


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Record the tensors that each call of a model is given."""
    calls: list[list[Tensor]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append([tensor.detach().clone() for tensor in find_tensors((args, kwargs))])

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _are_equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _note_of_calls(calls: Sequence[list[Tensor]], further: Sequence[list[Tensor]]) -> str | None:
    """Return what to say of a loss by the calls of two looks at one batch: the model's inputs."""
    if len(calls) > 1:
        return (
            f"It runs the model {len(calls)} times for one batch: if that is R-Drop, it is one too "
            "many"
        )
    pairs = zip(calls, further, strict=False)
    if all(len(a) == len(b) and all(map(_are_equal, a, b)) for a, b in pairs):
        return None
    return (
        "It changes its batch by chance, so that the passes are compared on other inputs: draw "
        "mixup and the like in the data collator"
    )


def _slope(
    model: nn.Module,
    compute: ComputeLoss,
    inputs: Mapping[str, Any],
    num_items: float | None,
    key: Key,
) -> Tensor | None:
    """Return the derivative of a loss with respect to the logits, 0 where it does not read them.

    None where nobody knows: they have no gradient, it is 0 here, or a part of the model knows a
    whole backward alone.
    """
    items = _on_device(num_items, inputs)
    with preserve_random_state(), preserve_buffers(model), torch.enable_grad():
        loss, output = compute(copy_structure(dict(inputs), clones=True), items)
        logits = find_tensor(output, key)
        if not (loss.requires_grad and logits.requires_grad):
            return None
        try:
            places: list[Tensor | GradientEdge] = [logits, *_same_numbers(logits)]
            for place in places:
                (slope,) = torch.autograd.grad(loss, place, allow_unused=True, retain_graph=True)
                if slope is not None:
                    # A loss whose margins are all met tells nothing.
                    return slope.reshape(logits.shape) if bool(slope.any()) else None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # as that of a reentrant checkpoint
            return None
    return torch.zeros_like(logits)


def _same_numbers(logits: Tensor) -> Iterator[GradientEdge]:
    """Yield what logits were copied or reshaped from, which a loss may have read in their place.

    Under autocast what a model returns is a copy in single precision.
    """
    node = logits.grad_fn
    while node is not None and node.name().rstrip("0123456789") in _COPIES:
        node, index = node.next_functions[0]
        if node is not None:
            yield GradientEdge(node, index)


def _no_slope(inputs: Mapping[str, Any], num_items: float | None, key: Key) -> None:
    return None


def _slope_of(
    slope_in: SlopeIn, num_items: float | None, inputs: Mapping[str, Any], key: Key
) -> Tensor | None:
    return slope_in(inputs, num_items, key)


def _on_device(num_items: float | None, inputs: Mapping[str, Any]) -> Tensor | None:
    if num_items is None:
        return None
    return torch.tensor(num_items, device=next(find_tensors(inputs)).device)
