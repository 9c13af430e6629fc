"""What the first batch tells of a loss that somebody else computes, and of the logits beside it.

What the loss is not known to be, a mean over rows or one that counts items, is tried.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regdrop.extra_pass import extra_pass
from regdrop.heads import Head
from regdrop.integrations.transformers.evaluation import (
    evaluation_mode,
    find_labels,
    shaken,
    training_without_dropout,
)
from regdrop.integrations.transformers.forward.attempt import attempt
from regdrop.integrations.transformers.likelihood.compared_outputs import (
    find_divergence,
    fits_head,
)
from regdrop.integrations.transformers.likelihood.loss_probe import LossProbe
from regdrop.integrations.transformers.likelihood.own_loss import ComputeLoss, OwnLoss
from regdrop.integrations.transformers.outputs import find_logits
from regdrop.integrations.transformers.tolerances import FORWARD, are_close
from regdrop.passes import (
    copy_structure,
    find_batch_size,
    find_tensors,
    preserve_buffers,
    repeat_batch,
)


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
        counts = _counts_items(model, compute, inputs) if counts_items is None else counts_items
        # A new head may score all rows alike, where many losses are the same.
        with shaken(model):
            if counts_items is None and not counts:
                counts = _counts_items(model, compute, inputs)
            probe = LossProbe(model, compute, counts, asks_slope)
            loss, output = probe.look(inputs)
            is_rowwise = _is_rowwise(probe, inputs, label_names)
            # Rows may not fit where they are moved.
            compare_slopes = partial(_is_slope_rowwise, probe, inputs, label_names, output)
            is_rowwise = is_rowwise and attempt(compare_slopes, otherwise=True)
            is_fit = head is not None and (is_given or fits_head(head, output, inputs, probe.slope))
            if not is_fit:
                divergence = find_divergence(loss, output, inputs, label_names, probe.slope)
        is_rowwise = is_rowwise and _is_rowwise(probe, inputs, label_names)
    found = _try_in_training(probe, inputs, label_names)
    return OwnLoss(counts, is_rowwise and found.is_rowwise, divergence, found.note)


def is_rowwise_in_training(
    model: nn.Module,
    compute: ComputeLoss,
    inputs: Mapping[str, Any],
    counts_items: bool,
    label_names: Sequence[str],
) -> bool:
    """Return whether a loss of stacked passes is the mean of theirs, as a step computes it now.

    Args:
        model: The unwrapped model.
        compute: The loss.
        inputs: A batch with its labels.
        counts_items: Whether the loss divides by the number of items that it is given.
        label_names: Names that labels have.
    """
    probe = LossProbe(model, compute, counts_items)
    return _try_in_training(probe, inputs, label_names).is_rowwise


def _counts_items(model: nn.Module, compute: ComputeLoss, inputs: Mapping[str, Any]) -> bool:
    """Return whether twice as many items make half the loss, which a divisor alone does."""
    probe = LossProbe(model, compute, counts_items=True)
    (once, _), (twice, _) = (probe.look(inputs, num_passes) for num_passes in (1, 2))
    return not are_close(once, twice)


def _is_rowwise(probe: LossProbe, inputs: Mapping[str, Any], label_names: Sequence[str]) -> bool:
    """Return whether the loss of stacked passes is the mean of theirs, as far as can be told."""
    loss, _ = probe.look(inputs)
    twice = attempt(lambda: probe.look(repeat_batch(dict(inputs)), 2)[0], otherwise=None)
    if twice is None or not are_close(twice, loss):
        return False
    # Passes are not the same: a correlation is that of its rows only while they are.
    moved, stacked = _moved_passes(inputs, label_names, 1)
    found = attempt(lambda: (probe.look(moved)[0], probe.look(stacked, 2)[0]), otherwise=None)
    # What belongs to a row may be elsewhere too: then nothing tells.
    return found is None or are_close(found[1], (loss + found[0]) / 2)


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
    probe: LossProbe, inputs: Mapping[str, Any], label_names: Sequence[str], output: Any
) -> bool:
    """Return whether what a loss asks of a row depends on it alone, as far as can be told.

    The root of a mean is so near to a mean over rows that its value does not tell.
    """
    rows = find_batch_size(inputs)
    key, _ = find_logits(output, rows)
    alone = probe.slope(inputs, key)
    # The rows that a loss chooses may be the same by chance.
    for shift in {1, rows // 2}:
        _, stacked = _moved_passes(inputs, label_names, shift)
        beside = None if alone is None else probe.slope(stacked, key, 2)
        if alone is None or beside is None or len(beside) != 2 * len(alone):
            return True
        difference = (2 * beside[: len(alone)] - alone).abs().sum()
        if difference > FORWARD.of(alone.dtype) * alone.abs().sum():
            return False
    return True


class _TrainingTrial(NamedTuple):
    """What one batch told of a loss in training mode, without the dropout that is known."""

    is_rowwise: bool
    note: str | None


def _try_in_training(
    probe: LossProbe, inputs: Mapping[str, Any], label_names: Sequence[str]
) -> _TrainingTrial:
    """Look at a loss in training mode; what needs more than that tells nothing."""

    def look_twice(batch: dict[str, Any]) -> list[tuple[Tensor, list[list[Tensor]]]]:
        found = []
        for _ in range(2):
            # Chance goes on from look to look, and nothing else does.
            with preserve_buffers(probe.model), _recorded_calls(probe.model) as calls:
                own = copy_structure(batch, clones=True)
                found.append((probe.compute(own, probe.items(batch))[0], calls))
        return found

    def judge() -> _TrainingTrial:
        (once, calls), (again, further) = extra_pass(probe.model, look_twice, dict(inputs))
        note = _note_of_calls(calls, further)
        # Where two looks differ at all, chance acts that is no known dropout.
        is_chance = not torch.isclose(once, again, rtol=1e-6, atol=0, equal_nan=True)
        is_rowwise = bool(is_chance) or _is_rowwise(probe, inputs, label_names)
        return _TrainingTrial(is_rowwise, note)

    with training_without_dropout(probe.model):
        return attempt(judge, otherwise=_TrainingTrial(is_rowwise=True, note=None))


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
