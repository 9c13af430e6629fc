"""Base class of the losses as modules: the options that they share."""

from torch import nn

from regdrop.loss.checks import check_options
from regdrop.loss.output import Reduction, Scale


class RDropLoss(nn.Module):
    """A loss as a module; `alpha` may be changed at will.

    Raises:
        TypeError, ValueError: For an option that is out of range.
    """

    def __init__(
        self,
        alpha: float,
        *,
        num_passes: int = 2,
        reduction: Reduction = "mean",
        scale: Scale = "mean",
        backward_passes: int | None = None,
    ) -> None:
        super().__init__()
        check_options(
            alpha=alpha,
            num_passes=num_passes,
            reduction=reduction,
            scale=scale,
            backward_passes=backward_passes,
        )
        self.alpha = alpha
        self.num_passes = num_passes
        self.reduction: Reduction = reduction
        self.scale: Scale = scale
        self.backward_passes = backward_passes

    def extra_repr(self) -> str:
        """Return the options that the module's printed form shows."""
        return f"alpha={self.alpha}, num_passes={self.num_passes}, scale={self.scale!r}"
