"""The target of the NLL term, in the form that every kernel reads."""

from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """What `N` flattened items are compared with: class indices or class probabilities.

    Exactly one of `classes` and `probabilities` is given. `valid` is None when every item counts;
    on an invalid item `classes` holds any class in range.
    """

    classes: Tensor | None  # (N,) int64
    probabilities: Tensor | None  # (N, C)
    weight: Tensor | None  # (C,)
    label_smoothing: float
    valid: Tensor | None  # (N,) bool

    def rows(self, start: int, stop: int) -> "Target":
        """Return the target of the items from `start` to `stop`."""
        return self._replace(
            classes=None if self.classes is None else self.classes[start:stop],
            probabilities=None if self.probabilities is None else self.probabilities[start:stop],
            valid=None if self.valid is None else self.valid[start:stop],
        )

    def resolved(self) -> "Target":
        """Return the target without lazy negatives, for kernels that read memory."""
        return self._replace(
            probabilities=None if self.probabilities is None else self.probabilities.resolve_neg(),
            weight=None if self.weight is None else self.weight.resolve_neg(),
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weighted, smoothed class probabilities, (N, C), of a probability target."""
        assert self.probabilities is not None
        dense = self.probabilities.to(dtype)
        if self.label_smoothing:
            dense = dense * (1 - self.label_smoothing) + self.label_smoothing / dense.shape[-1]
        return dense if self.weight is None else dense * self.weight.to(dtype)

    def class_mass(self, dtype: torch.dtype) -> Tensor | float:
        """Return the mass on the target class itself, (N,) with class weights, else a number."""
        assert self.classes is not None
        if self.weight is None:
            return 1 - self.label_smoothing
        return (1 - self.label_smoothing) * self.weight.to(dtype)[self.classes]

    def spread_mass(self, num_classes: int, dtype: torch.dtype) -> Tensor | float:
        """Return the mass that label smoothing puts on each class, (C,) with class weights."""
        share = self.label_smoothing / num_classes
        return share if self.weight is None else share * self.weight.to(dtype)
