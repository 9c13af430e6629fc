"""Looks at a model that leave it as it is: in one mode or the other, shaken, with labels moved."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.passes import preserve_modes, train_without_statistics
from regdrop.passes.dropout import rate_attributes

# How far parameters are moved, in their own deviation and at least.
_SHAKE, _SMALLEST_SHAKE = 0.5, 0.05


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode; the modes of all its modules come back on exit."""
    with preserve_modes(model):
        model.eval()
        yield


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in training mode; the modes of all its modules come back on exit."""
    with preserve_modes(model):
        model.train()
        yield


@contextmanager
def training_without_dropout(model: nn.Module) -> Iterator[None]:
    """Run a model in training mode, all rates of dropout that are known at 0, as its BatchNorm is.

    What a loss does in training alone is seen there, and nothing else.
    """
    sources = [found for found in rate_attributes(model) if found.source.rate > 0]
    try:
        for found in sources:
            setattr(found.owner, found.attribute, 0.0)
        with preserve_modes(model):
            train_without_statistics(model)
            yield
    finally:
        for found in sources:
            setattr(found.owner, found.attribute, found.source.rate)


@contextmanager
def shaken(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Move a model's parameters by chance; they are what they were on exit.

    A new head gives all classes alike, and many losses are the same there.
    """
    parameters = [_own_part(p) for p in model.parameters() if p.is_floating_point()]
    # Copies outside a GPU's memory, of which there may be none left.
    kept = [(p, p.to("cpu", copy=True)) for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter, value in kept:
                spread = float(value.float().std()) if value.numel() > 1 else 0.0
                noise = torch.randn(parameter.shape, generator=generator)
                noise *= max(_SMALLEST_SHAKE, _SHAKE * spread)
                parameter.add_(noise.to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _own_part(parameter: nn.Parameter) -> Tensor:
    """Return what this process holds of a parameter, which FSDP spreads over processes."""
    held = parameter.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def has_label(inputs: Any, label_names: Sequence[str]) -> bool:
    """Return whether something counts in a batch: not where all of its labels are ignored."""
    if not isinstance(inputs, Mapping):
        return False
    labels = [inputs[name] for name in find_labels(inputs, label_names)]
    return not labels or any(bool((x != IGNORE_INDEX).any()) for x in labels)


def find_labels(inputs: Mapping[str, Any], label_names: Sequence[str]) -> list[str]:
    """Return the names of a batch's labels: those that somebody gave, then the usual ones."""
    names = dict.fromkeys((*label_names, "labels", "label"))
    return [name for name in names if isinstance(inputs.get(name), Tensor)]


def with_other_labels(
    inputs: Mapping[str, Any], name: str, num_classes: int, ignore_index: int = IGNORE_INDEX
) -> dict[str, Any]:
    """Return a batch whose items have other labels, of the same kind.

    The first batch may have one class alone, which weights of classes do not show.

    Args:
        inputs: A batch with its labels.
        name: Name of the labels.
        num_classes: Number of classes of whole labels.
        ignore_index: The label that stays.
    """
    labels: Tensor = inputs[name]
    generator = torch.Generator().manual_seed(0)
    if labels.is_floating_point():
        is_share = labels.dim() > 1 and bool(((labels.sum(-1) - 1).abs() < 1e-3).all())
        if is_share:
            other = labels.roll(1, -1)
        else:
            are_chances = bool(((labels >= 0) & (labels <= 1)).all())
            # Every second one, so that there are both.
            odd = torch.arange(labels.numel(), device=labels.device).view(labels.shape) % 2 == 1
            other = torch.where(odd, 1 - labels if are_chances else labels + 1, labels)
    elif labels.dtype == torch.bool:
        other = ~labels
    else:
        is_class = (labels != ignore_index) & (labels >= 0) & (labels < num_classes)
        drawn = torch.randint(max(1, num_classes), (int(is_class.sum()),), generator=generator)
        # At least two classes, where there are two labels.
        drawn[:1], drawn[1:2] = 0, num_classes - 1
        other = labels.clone()
        other[is_class] = drawn.to(labels)
    return {**inputs, name: other}


def with_other_inputs(
    inputs: Mapping[str, Any], label_names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the batch with each of its inputs changed that holds numbers, or a yes or no a row.

    A loss may read what a first batch shows nothing of, as weights that are all 1. Labels stay, and
    masks, which `with_shorter_masks` cuts.

    Args:
        inputs: A batch with its labels.
        label_names: Names that labels have.
    """
    labels = find_labels(inputs, label_names)
    for name, value in inputs.items():
        if name in labels or name.endswith("mask") or not isinstance(value, Tensor):
            continue
        is_flag = value.dtype == torch.bool and value.dim() <= 2
        if (
            value.is_nested
            or value.is_sparse
            or value.numel() == 0
            or not (value.is_floating_point() or is_flag)
        ):
            continue
        odd = torch.arange(value.numel(), device=value.device).view(value.shape) % 2 == 1
        if value.numel() == 1:
            odd = ~odd
        if is_flag:
            other = torch.where(odd, ~value, value)
        elif bool((value == value.flatten()[:1]).all()):
            other = torch.where(odd, 2 * value + 1, value)
        else:  # numbers that the model can have, in other rows
            other = value.roll(1, 0)
        yield {**inputs, name: other}


def with_shorter_masks(
    inputs: Mapping[str, Any], shape: torch.Size
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each mask of the items' shape by name, and the batch with one row cut short by it.

    A loss may count what a mask tells, which a first batch without padding does not show.

    Args:
        inputs: A batch.
        shape: That of its items, rows of positions; for others nothing is yielded.
    """
    for name, mask in inputs.items():
        if not name.endswith("mask") or not isinstance(mask, Tensor):
            continue
        if mask.shape != shape or mask.dim() != 2 or bool(((mask != 0) & (mask != 1)).any()):
            continue
        row = mask.sum(1).argmax()
        ones = mask[row].bool()
        if ones.sum() < 2:
            continue
        # Padding may be on either side, and no row loses all that it has.
        shorter = mask.clone()
        shorter[row, ones.cumsum(0) > ones.sum() // 2] = 0
        yield name, {**inputs, name: shorter}
