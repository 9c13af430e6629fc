"""The loss of a model that no name tells, as one value: how each batch becomes a head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.heads import Head
from regdrop.integrations.transformers.outputs import Key, find_tensor
from regdrop.loss import (
    ItemTerms,
    binary_cross_entropy_terms,
    cross_entropy_terms,
    l1_terms,
    mse_terms,
    smooth_l1_terms,
)
from regdrop.loss.class_weight import class_weight_on

ELEMENTWISE: dict[str, Callable[..., ItemTerms]] = {
    "binary cross entropy": binary_cross_entropy_terms,
    "mean squared error": mse_terms,
    "mean absolute error": l1_terms,
    "smooth L1": smooth_l1_terms,
}
# A loss that is summed over the numbers of a row has a divergence that is summed too.
_SUMMED = ", summed over each row"
SUMMED = tuple(f"{family}{_SUMMED}" for family in ELEMENTWISE)


@dataclass(frozen=True)
class Recipe:
    """How every batch of a model becomes a head, as its first batch told.

    Attributes:
        family: "cross entropy", or an element-wise loss by name.
        label: Name of the labels in the batch.
        logits: Where they are in the model's output: a name, a position, or None for the output.
        is_shifted: Whether position t predicts the label of position t + 1.
        ignore_index: Label that does not count.
        class_dim: Dimension of the classes.
        is_flat: Whether the model merges items and positions in the logits' first dimension.
        keeps_label: Whether the model must be given the labels to run.
        num_classes: Number of classes of a cross entropy.
        reads_ignored: Whether -100 is one of the numbers that an element-wise loss reads.
    """

    family: str
    label: str
    logits: Key
    is_shifted: bool = False
    ignore_index: int = IGNORE_INDEX
    class_dim: int = -1
    is_flat: bool = False
    keeps_label: bool = False
    num_classes: int = 1
    reads_ignored: bool = False

    def __str__(self) -> str:
        if self.family != "cross entropy":
            return self.family
        shift = ", labels moved by one" if self.is_shifted else ""
        ignored = "" if self.ignore_index == IGNORE_INDEX else f", ignoring {self.ignore_index}"
        return f"{self.family}{shift}{ignored}"

    def head(
        self,
        inputs: Mapping[str, Any],
        *,
        label_smoothing: float = 0.0,
        class_weight: Sequence[float] | None = None,
        unlabelled_index: int | None = None,
    ) -> Head:
        """Return the head of a batch.

        Raises:
            ValueError: For options of a cross entropy beside another loss.
        """
        batch = dict(inputs)
        target: Tensor = batch[self.label] if self.keeps_label else batch.pop(self.label)
        rows = target.shape[0]
        if self.family != "cross entropy":
            if label_smoothing or class_weight is not None or unlabelled_index is not None:
                raise ValueError(
                    "label_smoothing, class_weight and unlabelled_index need a cross entropy; the "
                    f"model's own loss is {self.family}"
                )
            family = self.family.removesuffix(_SUMMED)
            head = Head(batch, target.float(), ELEMENTWISE[family], self._read_like(target))
            if family == self.family:
                return head
            summed = partial(_summed_terms, terms=head.terms)
            return replace(head, terms=summed, count=lambda _: head.counts())
        if self.is_shifted:
            target = F.pad(target[..., 1:], (0, 1), value=self.ignore_index)
        elif not target.is_floating_point() and target.dim() > 1 and target.shape[-1] == 1:
            target = target.flatten()
        if self.is_flat:
            target = target.flatten()
        options: dict[str, Any] = {"label_smoothing": label_smoothing}
        if self.class_dim != -1:
            options["class_dim"] = self.class_dim
        if class_weight is not None:
            options["weight"] = class_weight_on(target.device, class_weight)
        terms = partial(
            cross_entropy_terms,
            ignore_index=self.ignore_index,
            unlabelled_index=unlabelled_index,
            **options,
        )
        is_classes = not target.is_floating_point() and self.class_dim == -1
        return Head(batch, target, terms, self.read, takes_kernel=is_classes, batch_size=rows)

    def is_strange(self, inputs: Mapping[str, Any], unlabelled_index: int | None = None) -> bool:
        """Return whether labels hold what the recipe has no reading of, as a mark of missing ones.

        Args:
            inputs: A batch.
            unlabelled_index: A label that `head` knows too.
        """
        labels = inputs.get(self.label)
        if not isinstance(labels, Tensor):
            return False
        if self.family == "cross entropy":
            if labels.is_floating_point():
                return False
            known = (labels >= 0) & (labels < self.num_classes) | (labels == self.ignore_index)
            known = known if unlabelled_index is None else known | (labels == unlabelled_index)
        elif self.family.startswith("binary"):
            known = (labels >= 0) & (labels <= 1)
        else:
            known = labels == labels
            known = known if self.reads_ignored else known & (labels != IGNORE_INDEX)
        return not bool(known.all())

    def read(self, output: Any) -> Tensor:
        """Return the logits of the model's output."""
        return find_tensor(output, self.logits)

    def _read_like(self, target: Tensor) -> Callable[[Any], Tensor]:
        """Return a reader that gives one number an element of the target."""

        def read(output: Any) -> Tensor:
            return self.read(output).reshape(-1, *target.shape[1:])

        return read


def _summed_terms(
    logits: Tensor, target: Tensor, /, *, terms: Callable[..., ItemTerms], **options: Any
) -> ItemTerms:
    """Return the terms of elements so that their mean is that of the rows' sums."""
    found = terms(logits, target, **options)
    width = target[0].numel() if len(target) else 1
    return found._replace(nll=found.nll * width, kl=found.kl * width)
