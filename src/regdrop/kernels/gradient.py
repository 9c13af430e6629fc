"""Which passes carry the gradient: the unbiased form of fewer backward passes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function


def limit_backward(passes: Tensor, backward_passes: int) -> Tensor:
    """Return the passes with the gradient of the first ones scaled and the others cut.

    Masks are drawn alike for every pass and the loss is symmetric in them, so that
    num_passes / backward_passes times the gradient of a few passes estimates that of all
    without bias.

    Args:
        passes: (num_passes, ...).
        backward_passes: Number of first passes that keep a gradient.
    """
    num_passes = passes.shape[0]
    if backward_passes == num_passes:
        return passes
    kept: Tensor = _ScaleGradient.apply(passes[:backward_passes], num_passes / backward_passes)
    return torch.cat([kept, passes[backward_passes:].detach()])


class _ScaleGradient(Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * ctx.factor, None
