"""How the logits beside a loss of somebody else's are compared: a head of the divergence alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.heads import Head
from regdrop.integrations.transformers.outputs import Key, find_tensor
from regdrop.loss import (
    ItemCounts,
    ItemTerms,
    binary_cross_entropy_terms,
    mse_terms,
    symmetric_kl,
)
from regdrop.passes import find_tensors


@dataclass(frozen=True)
class Divergence:
    """How the logits of a model with a loss of its own are compared.

    Attributes:
        kind: "classes", "yes or no" (each class is one, and a label names the yes), "labels" (each
            a yes or no), "numbers" or "margins" (of pairs of rows).
        logits: Where they are in the output: a name, a position, or None for the output itself.
        mask: Name of the input that tells which items count, of their shape: one of yes or no, or
            whose name ends with "mask"; or labels, whose `ignore_index` does not count. None where
            all do.
        class_dim: Dimension of the classes.
        is_shifted: Whether position t predicts the label of position t + 1, which tells of `mask`.
        label: Name of the labels of "labels" and "numbers".
        ignores: Whether -100 do not count among "numbers", of which it may be one; nan never does,
            nor does anything but 0 to 1 among "labels".
        ignore_index: The label that does not count.
        num_classes: Labels below 0 or from this number on name no class and do not count either;
            None where they may.
        is_tail: Whether the items are the last positions, as words behind a picture are.
    """

    kind: str
    logits: Key
    mask: str | None = None
    label: str | None = None
    class_dim: int = -1
    is_shifted: bool = False
    ignores: bool = True
    ignore_index: int = IGNORE_INDEX
    num_classes: int | None = None
    is_tail: bool = False

    def __str__(self) -> str:
        name = "its output" if self.logits is None else f"output {self.logits!r}"
        if self.kind == "margins":
            return f"the KL of the margins of pairs of rows in {name}"
        items = "all" if self.mask is None else f"those that {self.mask} tells"
        if self.ignore_index != IGNORE_INDEX:
            items += f", but for {self.ignore_index}"
        if self.num_classes is not None:
            items += " and that name a class"
        items += ", moved by one" if self.is_shifted else ""
        items += ", at its end" if self.is_tail else ""
        if self.kind == "numbers":
            return f"the squared difference of {name} (items: {items})"
        if self.kind == "labels":
            return f"the KL of {name}, each number a yes or no (items: {items})"
        if self.kind == "yes or no":
            return f"the KL of {name}, each class a yes or no (items: {items})"
        return f"the KL of {name}, read as scores of classes (items: {items})"

    def head(self, inputs: Mapping[str, Any], rows: int) -> Head:
        """Return a head whose terms hold the divergence; its NLL is not used."""
        batch = dict(inputs)
        read = partial(find_tensor, key=self.logits)
        if self.kind == "margins":
            ones = torch.ones(rows // 2, device=next(find_tensors(batch)).device)
            margins = partial(_read_margins, read=read)
            return Head(batch, ones, binary_cross_entropy_terms, margins, batch_size=rows)
        if self.label is not None:
            labels: Tensor = batch[self.label]
            target = labels.float()
            if self.kind == "labels":
                # What is no chance marks a missing label.
                target = target.masked_fill(~((target >= 0) & (target <= 1)), torch.nan)
            elif self.ignores:
                target = target.masked_fill(labels == IGNORE_INDEX, torch.nan)
            if self.mask is not None:
                target = target.masked_fill(~self.counted(batch, rows), torch.nan)
            of_elements = binary_cross_entropy_terms if self.kind == "labels" else mse_terms
            terms = partial(_element_terms, terms=of_elements)
            shaped = partial(_read_shaped, read=read, shape=target.shape[1:])
            return Head(batch, target, terms, shaped, batch_size=rows, count=_count_numbers)
        counted = self.counted(batch, rows)
        if self.is_tail:
            read = partial(_read_tail, read=read, length=counted.shape[1])
        of_items = _yes_or_no_terms if self.kind == "yes or no" else _class_terms
        terms = partial(of_items, class_dim=self.class_dim)
        return Head(batch, counted, terms, read, batch_size=rows, count=_count_true)

    def counted(self, inputs: Mapping[str, Any], rows: int) -> Tensor:
        """Return which items count, of the mask's shape; without one, which rows."""
        if self.mask is None:
            return torch.ones(rows, dtype=torch.bool, device=next(find_tensors(inputs)).device)
        mask: Tensor = inputs[self.mask]
        is_yes_or_no = mask.dtype == torch.bool or self.mask.endswith("mask")
        counted = mask.bool() if is_yes_or_no else mask != self.ignore_index
        if self.num_classes is not None and not is_yes_or_no:
            counted = counted & (mask >= 0) & (mask < self.num_classes)
        return F.pad(counted[..., 1:], (0, 1), value=False) if self.is_shifted else counted


def _class_terms(
    logits: Tensor, counted: Tensor, /, *, num_passes: int, class_dim: int, **_: Any
) -> ItemTerms:
    """Return the KL of each item; of each row its mean over positions where all of them count."""
    logits = logits.movedim(class_dim, -1)
    if num_passes == 1:
        kl = torch.zeros(counted.shape, device=logits.device)
    elif logits.shape[1:-1] == counted.shape[1:]:
        kl = symmetric_kl(logits, num_passes=num_passes, mask=counted, reduction="none")
    else:
        kl = symmetric_kl(logits, num_passes=num_passes, reduction="none").flatten(1).mean(1)
    return ItemTerms(torch.zeros_like(kl), kl, *_count_true(counted))


def _yes_or_no_terms(
    logits: Tensor, counted: Tensor, /, *, num_passes: int, class_dim: int, **_: Any
) -> ItemTerms:
    """Return of each item the mean over its classes of the KL of a yes or no."""
    logits = logits.movedim(class_dim, -1)
    target = logits.new_zeros(len(logits) // num_passes, *logits.shape[1:])
    kl = binary_cross_entropy_terms(logits, target, num_passes=num_passes).kl
    kl = kl.expand(target.shape).flatten(counted.dim()).mean(-1).masked_fill(~counted, 0)
    return ItemTerms(torch.zeros_like(kl), kl, *_count_true(counted))


def _element_terms(
    outputs: Tensor,
    target: Tensor,
    /,
    *,
    num_passes: int,
    terms: Callable[..., ItemTerms],
    **_: Any,
) -> ItemTerms:
    """Return the terms of every element whose target is a number."""
    return terms(outputs, target, num_passes=num_passes, mask=~target.isnan())


def _count_numbers(target: Tensor) -> ItemCounts:
    return _count_true(~target.isnan())


def _count_true(counted: Tensor) -> ItemCounts:
    return ItemCounts(counted.sum(), counted.sum())


def _read_margins(output: Any, *, read: Callable[[Any], Tensor]) -> Tensor:
    """Return the margin of each pair of one pass: the first half of its rows less the second."""
    chosen, rejected = read(output).flatten().chunk(2)
    return chosen - rejected


def _read_shaped(output: Any, *, read: Callable[[Any], Tensor], shape: torch.Size) -> Tensor:
    return read(output).reshape(-1, *shape)


def _read_tail(output: Any, *, read: Callable[[Any], Tensor], length: int) -> Tensor:
    return read(output)[:, -length:]
