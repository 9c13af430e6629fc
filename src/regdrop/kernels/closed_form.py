"""Autograd around the closed form, shared by every kernel that computes it.

With p_i = softmax(z_i), d_i = z_i - mean_j z_j and E_i = sum_v p_i d_i, an item's symmetric KL,
averaged over the pairs of m passes, is `sum_i E_i / (m - 1)`: row constants cancel, so neither a
logarithm nor a log-sum-exp enters it. Its gradient with respect to z_i is

    (p_i (1 + d_i - E_i) - mean_j p_j) / (m - 1),

and that of the NLL is `(mass * p_i - target) / m`. The forward keeps a few numbers a row;
the backward writes the gradient once, with the upstream gradient folded in in float32.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import Function

from regdrop.kernels.backward_passes import Unpack, differentiable_once
from regdrop.kernels.class_columns import ClassRows
from regdrop.kernels.target import Target


class ForwardKernel(Protocol):
    """From (num_passes, N, C) logits to NLL, divergence, (N,) each, and row statistics."""

    def __call__(
        self, logits: Tensor, target: Target, /
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the negative log-likelihood, the symmetric KL and what the backward needs."""


class BackwardKernel(Protocol):
    """Writes the gradient of the logits to `out`: the logits themselves, or memory of its own.

    `grad_nll` and `grad_kl`, (N,) or None, are the upstream gradients over the number of passes
    (less one for the divergence), already scaled for the passes that carry the gradient. Their
    stride is 0 where all items have the same.
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


# Of a term in a sum over items: a number, which may be on the device; None leaves the term out.
Weight = float | Tensor | None
Slope = TypeVar("Slope", Tensor | None, Weight)


class SumKernel(Protocol):
    """From (num_passes, N, C) logits to the sums of both terms, and the gradient of their mixture.

    The gradient is what a `BackwardKernel` writes for the first passes where `nll_slope` and
    `kl_slope` are each item's, (backward_passes, N, C), in float32 at least.
    """

    def __call__(
        self,
        logits: Tensor,
        target: Target,
        nll_slope: Weight,
        kl_slope: Weight,
        backward_passes: int,
        inplace: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return two scalars and the gradient; None where a backward of its own takes less."""


class ClosedForm(NamedTuple):
    """One way to compute the closed form.

    Attributes:
        forward: Computes the terms.
        backward: Writes the gradient.
        least_items: Items a call, below which it leaves a part of the device idle.
        class_rows: Its form for a block of classes; None leaves that to torch.
        sums: Computes the gradient in the forward, for sums of the terms.
    """

    forward: ForwardKernel
    backward: BackwardKernel
    least_items: int = 1
    class_rows: ClassRows | None = None
    sums: SumKernel | None = None


def closed_form_terms(
    logits: Tensor, target: Target, kernel: ClosedForm, *, backward_passes: int, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Return each item's NLL and divergence, with a closed-form gradient.

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


def closed_form_sum(
    logits: Tensor,
    target: Target,
    kernel: ClosedForm,
    *,
    nll_weight: Weight,
    kl_weight: Weight,
    backward_passes: int,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weighted sum of both terms over the items, in fewer operations than the terms take.

    Args:
        logits: As in `closed_form_terms`.
        target: As in `closed_form_terms`.
        kernel: As in `closed_form_terms`.
        nll_weight: Weight of every item's NLL, a number; None leaves it out.
        kl_weight: Weight of every item's divergence, likewise.
        backward_passes: As in `closed_form_terms`.
        inplace: As in `closed_form_terms`.

    Returns:
        The sum, and the sums of both terms without weight and gradient, all scalars.
    """
    # A kernel reads memory, which a lazy negative shares with the numbers that it negates.
    logits = logits.resolve_neg()
    if torch.is_grad_enabled() and logits.requires_grad:
        total, nll, kl = _Sum.apply(
            logits, target, kernel, (nll_weight, kl_weight), backward_passes, inplace
        )
        return total, nll, kl
    items_nll, items_kl, _ = kernel.forward(logits.detach(), target)
    nll, kl = items_nll.sum(), items_kl.sum()
    return mix(nll, kl, nll_weight, kl_weight), nll, kl


def pass_slopes(
    grad_nll: Slope, grad_kl: Slope, num_passes: int, backward_passes: int
) -> tuple[Slope, Slope]:
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
        _save(ctx, logits, target, statistics, kernel, backward_passes, inplace)
        return nll, kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, unpack: Unpack, grad_nll: Tensor | None, grad_kl: Tensor | None) -> Any:
        if grad_nll is None and grad_kl is None:
            return None, None, None, None, None
        grads = pass_slopes(grad_nll, grad_kl, ctx.num_passes, ctx.backward_passes)
        return _write_gradient(ctx, unpack, *grads), None, None, None, None


class _Sum(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Target,
        kernel: ClosedForm,
        weights: tuple[Weight, Weight],
        backward_passes: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        slopes = pass_slopes(*weights, logits.shape[0], backward_passes)
        found = None
        if kernel.sums is not None:
            found = kernel.sums(logits, target, *slopes, backward_passes, inplace)
        if found is None:
            items_nll, items_kl, statistics = kernel.forward(logits, target)
            nll, kl, ctx.gradient = items_nll.sum(), items_kl.sum(), None
        else:
            nll, kl, ctx.gradient = found
            statistics = ()
        _save(ctx, logits, target, statistics, kernel, backward_passes, inplace)
        ctx.slopes, ctx.has_gradient = slopes, found is not None
        ctx.mark_non_differentiable(nll, kl)
        return mix(nll, kl, *weights), nll, kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, unpack: Unpack, grad: Tensor | None, *unused: Any) -> Any:
        if grad is None:
            return None, None, None, None, None, None
        if ctx.has_gradient:
            found = _kept_gradient(ctx, unpack, grad)
        else:
            slopes = (None if x is None else _at_slope(grad, x) for x in ctx.slopes)
            items = (None if x is None else x.expand(ctx.num_items) for x in slopes)
            found = _write_gradient(ctx, unpack, *items)
        return found, None, None, None, None, None


def mix(nll: Tensor, kl: Tensor, nll_weight: Weight, kl_weight: Weight) -> Tensor:
    """Return the weighted sum of two numbers, a tensor of its own.

    The compiler of torch 2.11 gives a zero gradient to outputs that were written in place.
    """
    if isinstance(nll_weight, float) and nll_weight == 1 and isinstance(kl_weight, float):
        return torch.add(nll, kl, alpha=kl_weight)
    total = torch.zeros_like(nll) if nll_weight is None else nll * nll_weight
    if kl_weight is None:
        return total
    if isinstance(kl_weight, Tensor):
        return total + kl * kl_weight
    return torch.add(total, kl, alpha=kl_weight)


def _at_slope(grad: Tensor, slope: Tensor | float) -> Tensor:
    return grad * (slope.to(grad.device, grad.dtype) if isinstance(slope, Tensor) else slope)


def _save(
    ctx: Any,
    logits: Tensor,
    target: Target,
    statistics: tuple[Tensor, ...],
    kernel: ClosedForm,
    backward_passes: int,
    inplace: bool,
) -> None:
    ctx.target_fields = [isinstance(x, Tensor) for x in target]
    ctx.save_for_backward(logits, *(x for x in target if isinstance(x, Tensor)), *statistics)
    ctx.label_smoothing = target.label_smoothing
    ctx.num_passes, ctx.num_items = logits.shape[:2]
    ctx.dtype = logits.dtype
    ctx.kernel, ctx.backward_passes = kernel, backward_passes
    # The compiler decides by itself which buffers to reuse.
    ctx.inplace = inplace and not torch.compiler.is_compiling()
    ctx.set_materialize_grads(False)


def _saved(ctx: Any, unpack: Unpack) -> tuple[Tensor, Target, tuple[Tensor, ...]]:
    logits, *rest = unpack()
    classes, probabilities, weight, _, valid = (
        rest.pop(0) if given else None for given in ctx.target_fields
    )
    target = Target(classes, probabilities, weight, ctx.label_smoothing, valid)
    return logits.detach(), target, tuple(rest)


def _write_gradient(
    ctx: Any, unpack: Unpack, grad_nll: Tensor | None, grad_kl: Tensor | None
) -> Tensor:
    """Return the gradient of the logits, in their memory if asked for, by the kernel."""
    logits, target, statistics = _saved(ctx, unpack)
    out = _memory_for_gradient(ctx, logits)
    ctx.kernel.backward(out, logits, target, statistics, grad_nll, grad_kl, ctx.backward_passes)
    return _finished(ctx, out)


def _kept_gradient(ctx: Any, unpack: Unpack, grad: Tensor) -> Tensor:
    """Return the gradient that the forward computed, multiplied, as that of the logits."""
    # Autograd clones what anybody else still refers to.
    gradient, ctx.gradient = ctx.gradient, None
    graded = ctx.backward_passes
    is_whole = graded == ctx.num_passes
    if gradient is not None and not ctx.inplace and gradient.dtype == ctx.dtype and is_whole:
        scaled: Tensor = gradient.mul_(grad)
        return scaled
    logits, target, _ = _saved(ctx, unpack)
    if gradient is None:  # a second backward: the first has given it away
        gradient = ctx.kernel.sums(logits, target, *ctx.slopes, graded, ctx.inplace)[-1]
    out = _memory_for_gradient(ctx, logits)
    torch.mul(gradient, grad, out=out if is_whole else out[:graded])
    if not is_whole:
        out[graded:].zero_()
    return _finished(ctx, out)


def _memory_for_gradient(ctx: Any, logits: Tensor) -> Tensor:
    if ctx.inplace:
        return logits
    if torch.compiler.is_compiling():  # it lets no operation write to memory of other strides
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    return torch.empty_like(logits)


def _finished(ctx: Any, out: Tensor) -> Tensor:
    if ctx.inplace:
        # Autograd then refuses a layer's backward that needs the logits. Not every kernel writes
        # through an operation of torch, which would count by itself.
        torch.autograd.graph.increment_version(out)
    return out
