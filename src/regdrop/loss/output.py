"""What every loss of the library returns, and how it is reduced."""

from typing import Literal, NamedTuple

from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
Scale = Literal["sum", "mean"]


class RDropOutput(NamedTuple):
    """The loss to minimise and its two parts, detached means over valid items.

    Attributes:
        loss: The objective; carries the gradient. A scalar, or one number an item under
            `reduction="none"`.
        nll: The NLL term of one pass (mean over passes), comparable with the loss of
            training without R-Drop.
        kl: The symmetric KL divergence (or its counterpart for the output), mean over pairs of
            passes.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
