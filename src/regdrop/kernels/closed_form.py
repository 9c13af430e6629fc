"""Autograd around the closed form, shared by every kernel that computes it.

With p_i = softmax(z_i), d_i = z_i - mean_j z_j and E_i = sum_v p_i d_i, an item's symmetric KL,
averaged over the pairs of m passes, is `sum_i E_i / (m - 1)`: row constants cancel, so neither a
logarithm nor a log-sum-exp enters it. Its gradient with respect to z_i is

    (p_i (1 + d_i - E_i) - mean_j p_j) / (m - 1),

and that of the likelihood is `(mass * p_i - target) / m`. The forward keeps a few numbers a row;
the backward writes the gradient once, with the upstream gradient folded in in float32.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function

from regdrop.kernels.gradient import differentiable_once
from regdrop.kernels.target import Target


class ForwardKernel(Protocol):
    """From (num_passes, N, C) logits to likelihood, divergence, (N,) each, and row statistics."""

    def __call__(
        self, logits: Tensor, target: Target, /
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the negative log-likelihood, the symmetric KL and what the backward needs."""


class BackwardKernel(Protocol):
    """Writes the gradient of the logits to `out`: the logits themselves, or memory of its own.

    `grad_nll` and `grad_kl`, (N,) or None, are the upstream gradients over the number of passes
    (less one for the divergence), already scaled for the passes that carry the gradient.
    """

    def __call__(
        self,
        out: Tensor,
        logits: Tensor,
        target: Target,
        statistics: tuple[Tensor, ...],
        grad_nll: Tensor | None,
        grad_kl: Tensor | None,
        backward_passes: int,
        /,
    ) -> None:
        """Write the gradient of the first passes, and 0 to the others."""


class ClosedForm(NamedTuple):
    """One way to compute the closed form.

    Attributes:
        forward: Computes the terms.
        backward: Writes the gradient.
        least_items: Items a call, below which it leaves a part of the device idle.
        class_rows: Its form for a block of classes, a `ClassRows`; None leaves that to torch.
    """

    forward: ForwardKernel
    backward: BackwardKernel
    least_items: int = 1
    class_rows: Any = None


def closed_form_terms(
    logits: Tensor, target: Target, kernel: ClosedForm, *, backward_passes: int, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Return each item's likelihood and divergence, with a closed-form gradient.

    Args:
        logits: (num_passes, N, C); half precision is read and written once, computed in float32.
        target: What the N items are compared with; gets no gradient.
        kernel: What computes the terms and the gradient.
        backward_passes: The first passes that carry the gradient, times num_passes / this.
        inplace: Overwrite `logits` with the gradient in the backward.

    Returns:
        The negative log-likelihood, mean over passes, and the symmetric KL, mean over pairs of
        passes, both (N,) and 0 on invalid items.
    """
    # A kernel reads memory, which a lazy negative shares with the numbers that it negates.
    logits = logits.resolve_neg()
    if torch.is_grad_enabled() and logits.requires_grad:
        nll, kl = _Terms.apply(logits, target, kernel, backward_passes, inplace)
    else:
        nll, kl, _ = kernel.forward(logits.detach(), target)
    return nll, kl


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which terms of numbers of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_gradients(
    grad_nll: Tensor | None, grad_kl: Tensor | None, num_passes: int, backward_passes: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return upstream gradients of both terms as a `BackwardKernel` takes them."""
    if grad_nll is not None:
        grad_nll = grad_nll * (1 / backward_passes)
    if num_passes == 1:
        grad_kl = None
    elif grad_kl is not None:
        grad_kl = grad_kl * (num_passes / backward_passes / (num_passes - 1))
    return grad_nll, grad_kl


class _Terms(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Target,
        kernel: ClosedForm,
        backward_passes: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        nll, kl, statistics = kernel.forward(logits, target)
        fields = [x for x in target if isinstance(x, Tensor)]
        ctx.save_for_backward(logits, *fields, *statistics)
        ctx.label_smoothing = target.label_smoothing
        ctx.target_fields = [isinstance(x, Tensor) for x in target]
        ctx.kernel = kernel
        ctx.backward_passes = backward_passes
        # The compiler decides by itself which buffers to reuse.
        ctx.inplace = inplace and not torch.compiler.is_compiling()
        ctx.set_materialize_grads(False)
        return nll, kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_nll: Tensor | None, grad_kl: Tensor | None) -> Any:
        if grad_nll is None and grad_kl is None:
            return None, None, None, None, None
        saved, *rest = ctx.saved_tensors
        logits = saved.detach()
        classes, probabilities, weight, _, valid = (
            rest.pop(0) if given else None for given in ctx.target_fields
        )
        target = Target(classes, probabilities, weight, ctx.label_smoothing, valid)
        grads = scale_gradients(grad_nll, grad_kl, logits.shape[0], ctx.backward_passes)
        out = logits if ctx.inplace else torch.empty_like(logits)
        ctx.kernel.backward(out, logits, target, tuple(rest), *grads, ctx.backward_passes)
        if ctx.inplace:
            # Autograd then refuses a layer's backward that needs the logits. Not every kernel
            # writes through an operation of torch, which would count by itself.
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None
