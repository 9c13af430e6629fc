"""Which passes carry the gradient, the unbiased form of fewer backward passes; and which way."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import Function

from regdrop.tracing import is_batched

# Returns the tensors that a forward has saved.
Unpack = Callable[[], tuple[Tensor, ...]]

_WAY_OUT = "use rdrop_cross_entropy with impl='eager', or RDropConfig(impl='eager')"
_NO_BATCHED = (
    "the closed form of the R-Drop loss gives one gradient at a time, not a batch of them "
    f"(is_grads_batched, vectorize); {_WAY_OUT}"
)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to differentiate a function's gradient again, by name.

    Torch's own `once_differentiable` lets a gradient through whose upstream gradient is a number,
    and its derivative is silently 0.

    Args:
        backward: Called as `backward(ctx, unpack, *grads)`. `unpack()` returns the saved tensors,
            at most once: a checkpoint refuses to unpack them again, and others copy them again.
    """

    @wraps(backward)
    def refused_twice(ctx: Any, *grads: Any) -> Any:
        if not torch.compiler.is_compiling() and any(map(is_batched, grads)):
            raise RuntimeError(_NO_BATCHED)
        if not torch.is_grad_enabled():
            return backward(ctx, lambda: ctx.saved_tensors, *grads)
        saved = ctx.saved_tensors
        sources = [x for x in (*saved, *grads) if x is not None and x.requires_grad]
        with torch.no_grad():
            found = backward(ctx, lambda: saved, *grads)
        if torch.compiler.is_compiling():
            return found
        given = [x for x in found if x is not None]
        once = iter(_NoSecondDerivative.apply(len(given), *given, *sources) if given else ())
        return tuple(None if x is None else next(once) for x in found)

    return refused_twice


def has_tangent(*tensors: Any) -> bool:
    """Return whether a tensor is differentiated in forward mode, as in `torch.func.jvp`."""
    if torch.compiler.is_compiling():
        return False
    return any(
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def graded_passes(num_passes: int, backward_passes: int | None) -> int:
    """Return the number of first passes that carry the gradient; None stands for all of them."""
    return num_passes if backward_passes is None else backward_passes


def limit_backward(passes: Tensor, backward_passes: int | None) -> Tensor:
    """Return the passes with the gradient of the first ones scaled and the others cut.

    Masks are drawn alike for every pass and the loss is symmetric in them, so that
    num_passes / backward_passes times the gradient of a few passes estimates that of all
    without bias.

    Args:
        passes: (num_passes, ...).
        backward_passes: Number of first passes that keep a gradient; None: all.

    Raises:
        ValueError: In forward mode, which differentiates the value of all passes.
    """
    num_passes = passes.shape[0]
    if backward_passes is None or backward_passes == num_passes:
        return passes
    if has_tangent(passes):
        raise ValueError(
            f"backward_passes must be None or num_passes={num_passes} in forward-mode "
            f"differentiation, got {backward_passes}"
        )
    kept: Tensor = _MultiplyInBackward.apply(passes[:backward_passes], num_passes / backward_passes)
    return torch.cat([kept, passes[backward_passes:].detach()])


class _NoSecondDerivative(Function):
    """Gradients as they are, behind what they depend on: whoever differentiates them is refused."""

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"the closed form of the R-Drop loss gives no second derivative; {_WAY_OUT}"
        )


class _MultiplyInBackward(Function):
    """Identity whose gradient is multiplied by a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * ctx.factor, None
