"""What the losses of all output families hold as modules: the options that each of them has."""

from torch import nn

from regdrop.loss.checks import check_options
from regdrop.loss.reduction import Reduction, Scale


class RDropLoss(nn.Module):
    """Base of the losses as modules; `alpha` may be changed at will.

    Raises:
        TypeError, ValueError: For an option that is out of range.
    """

    def __init__(
        self,
        alpha: float,
        *,
        num_passes: int = 2,
        reduction: Reduction = "mean",
        scale: Scale = "sum",
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
