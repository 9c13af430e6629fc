"""Means of the two terms between two logs, over micro-batches and processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regdrop.kernels.precision import widest_dtype
from regdrop.loss import ItemCounts
from regdrop.schedule import StepPlan


class LossMeter:
    """NLL and divergence since the last log, summed on the device over items.

    Nothing is read back from the device before `collect` or `state`.

    Args:
        leaves_out: Whether means that are not finite are left out.

    Attributes:
        alpha: That of the last step with more than one pass.
    """

    def __init__(self, leaves_out: bool = False) -> None:
        self.alpha = 0.0
        self._leaves_out = leaves_out
        self._sums: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the last log."""
        return self._sums is None

    def add(self, plan: StepPlan, nll: Tensor, kl: Tensor | None, counts: ItemCounts) -> None:
        """Add the means of a micro-batch, each times what it is a mean over.

        Args:
            plan: What the step did.
            nll: Mean NLL of the micro-batch.
            kl: Mean divergence; None where it was not measured.
            counts: What they are means over.
        """
        weight, count = counts
        if kl is None:
            kl, count = torch.zeros_like(nll), torch.zeros_like(count)
        if self._leaves_out:
            nll, weight = _without_infinite(nll, weight)
            kl, count = _without_infinite(kl, count)
        # In double, where a device has it: float32 loses digits over a long log.
        weight, count = (x.to(widest_dtype(nll.device)) for x in (weight, count))
        sums = torch.stack([nll * weight, weight, kl * count, count])
        self._sums = sums if self._sums is None else self._sums + sums
        if plan.num_passes > 1:
            self.alpha = plan.alpha

    def collect(self, reduce: Callable[..., Any]) -> dict[str, float]:
        """Return the means over all processes, and begin anew.

        A mean over no item is left out, as the divergence where it was not measured.

        Args:
            reduce: Sums a tensor over all processes, called as `reduce(tensor, reduction="sum")`.
        """
        nll, weight, kl, count = reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        parts = {"nll": nll / weight} if weight else {}
        parts["alpha"] = self.alpha
        return parts | ({"kl": kl / count} if count else {})

    def state(self, reduce: Callable[..., Any]) -> dict[str, Any]:
        """Return what a checkpoint keeps: the sums over all processes."""
        sums = None if self._sums is None else reduce(self._sums, reduction="sum").tolist()
        return {"alpha": self.alpha, "sums": sums}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up the sums of a checkpoint; one process of all does so."""
        self.alpha = state["alpha"]
        sums, dtype = state["sums"], widest_dtype(device)
        self._sums = None if sums is None else torch.tensor(sums, dtype=dtype, device=device)


def _without_infinite(mean: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mean and its items; 0 and none where it is nan or infinite."""
    is_finite = mean.isfinite()
    return torch.where(is_finite, mean, 0), torch.where(is_finite, items, 0)
