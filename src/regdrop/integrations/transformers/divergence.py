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


@dataclass(frozen=True)
class Divergence:
    """How the logits of a model with a loss of its own are compared.

    Attributes:
        kind: "classes", "labels" (each a yes or no), "numbers" or "margins" (of pairs of rows).
        logits: Where they are in the output: a name, a position, or None for the output itself.
        mask: Name of the input that tells which items count, of their shape; None where all do.
        class_dim: Dimension of the classes.
        is_shifted: Whether position t predicts the label of position t + 1, which tells of `mask`.
        label: Name of the labels of "labels" and "numbers".
    """

    kind: str
    logits: Key
    mask: str | None = None
    label: str | None = None
    class_dim: int = -1
    is_shifted: bool = False

    def __str__(self) -> str:
        name = "its output" if self.logits is None else f"output {self.logits!r}"
        if self.kind == "margins":
            return f"the KL of the margins of pairs of rows in {name}"
        if self.kind == "numbers":
            return f"the squared difference of {name}"
        if self.kind == "labels":
            return f"the KL of {name}, each number a yes or no"
        items = "all" if self.mask is None else f"those that {self.mask} tells"
        items += ", moved by one" if self.is_shifted else ""
        return f"the KL of {name}, read as scores of classes (items: {items})"

    def head(self, inputs: Mapping[str, Any], rows: int) -> Head:
        """Return a head whose terms hold the divergence; its NLL is not used."""
        batch = dict(inputs)
        read = partial(find_tensor, key=self.logits)
        if self.kind == "margins":
            device = next(v for v in batch.values() if isinstance(v, Tensor)).device
            ones = torch.ones(rows // 2, device=device)
            margins = partial(_read_margins, read=read)
            return Head(batch, ones, binary_cross_entropy_terms, margins, batch_size=rows)
        if self.label is not None:
            target = batch[self.label].float()
            terms = binary_cross_entropy_terms if self.kind == "labels" else mse_terms
            shaped = partial(_read_shaped, read=read, shape=target.shape[1:])
            return Head(batch, target, terms, shaped, batch_size=rows)
        counted = self.counted(batch, rows)
        terms = partial(_class_terms, class_dim=self.class_dim)
        return Head(batch, counted, terms, read, batch_size=rows, count=_count_true)

    def counted(self, inputs: Mapping[str, Any], rows: int) -> Tensor:
        """Return which items of "classes" count, of the mask's shape; without one, which rows."""
        if self.mask is None:
            device = next(v for v in inputs.values() if isinstance(v, Tensor)).device
            return torch.ones(rows, dtype=torch.bool, device=device)
        mask: Tensor = inputs[self.mask]
        counted = mask.bool() if self.mask == "attention_mask" else mask != IGNORE_INDEX
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


def _count_true(counted: Tensor) -> ItemCounts:
    return ItemCounts(counted.sum(), counted.sum())


def _read_margins(output: Any, *, read: Callable[[Any], Tensor]) -> Tensor:
    """Return the margin of each pair of one pass: the first half of its rows less the second."""
    chosen, rejected = read(output).flatten().chunk(2)
    return chosen - rejected


def _read_shaped(output: Any, *, read: Callable[[Any], Tensor], shape: torch.Size) -> Tensor:
    return read(output).reshape(-1, *shape)
