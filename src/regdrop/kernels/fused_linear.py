"""The R-Drop terms behind a linear layer, with autograd around them: full logits never exist.

`linear_chunks.py` goes through the items. Where the weights of both terms are known beforehand, as
in a mean, it computes the gradient in the forward, and the backward only scales; else the backward
computes the logits again. `class_blocks.py` goes through the classes, keeps what logits it can,
and computes the gradient in the backward; `_goes_by_classes` chooses.

Half precision multiplies matrices in half precision and does the rest in float32: gradients of
logits in float16 are never divided by a number of items before they are cast, since they would
underflow, and sums over chunks are in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from regdrop.kernels.backward_passes import Unpack, differentiable_once, has_tangent
from regdrop.kernels.class_blocks import BUDGET, collect_blocks, grade_blocks, make_plan
from regdrop.kernels.closed_form import Weight, mix
from regdrop.kernels.linear_operator import linear_chunks
from regdrop.kernels.precision import accumulation_dtype
from regdrop.kernels.projection import (
    Gradients,
    Projection,
    TermGradients,
    Wanted,
    with_dtype,
)
from regdrop.kernels.target import Target
from regdrop.tracing import is_transformed


def linear_terms(
    hidden: Tensor, projection: Projection, target: Target, *, backward_passes: int
) -> tuple[Tensor, Tensor]:
    """Return each item's NLL and divergence; the backward computes the logits again.

    Args:
        hidden: (num_passes, N, features).
        projection: The layer; its tensors get gradients too.
        target: Class indices of the N items; gets no gradient.
        backward_passes: The first passes that carry the gradient, times num_passes / this.

    Returns:
        The negative log-likelihood, mean over passes, and the symmetric KL, mean over pairs of
        passes, both (N,), in float32 at least.

    Raises:
        ValueError: In forward-mode differentiation and in `torch.func`.
    """
    _refuse_transforms(hidden, projection)
    projection = with_dtype(hidden, projection)
    if not _needs_gradient(hidden, projection):
        nll, kl, _ = linear_chunks(hidden, projection, target)
    else:
        terms = _BlockTerms if _goes_by_classes(hidden, projection) else _LinearTerms
        nll, kl = terms.apply(
            hidden, projection.weight, projection.bias, projection, target, backward_passes
        )
    return nll, kl


def linear_loss(
    hidden: Tensor,
    projection: Projection,
    target: Target,
    *,
    nll_weight: Weight,
    kl_weight: Weight,
    backward_passes: int,
    labelled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weighted sum of both terms over items, whose gradient the forward may compute.

    Args:
        hidden: As in `linear_terms`.
        projection: As in `linear_terms`.
        target: As in `linear_terms`.
        nll_weight: Weight of every item's NLL, near 1 so that half precision holds the
            gradient; None leaves it out.
        kl_weight: Weight of every item's divergence, likewise.
        backward_passes: As in `linear_terms`.
        labelled: Which items count in the NLL, (N,); None for all.

    Returns:
        The sum, and the sums of both terms without weight and gradient, all scalars.

    Raises:
        ValueError: In forward-mode differentiation and in `torch.func`.
    """
    _refuse_transforms(hidden, projection)
    projection = with_dtype(hidden, projection)
    weights = (nll_weight, kl_weight)
    if not _needs_gradient(hidden, projection):
        nll, kl, _ = linear_chunks(hidden, projection, target)
        return _sum_up(nll, kl, weights, labelled)
    if _goes_by_classes(hidden, projection):
        nll, kl = _BlockTerms.apply(
            hidden, projection.weight, projection.bias, projection, target, backward_passes
        )
        return _sum_up(nll, kl, weights, labelled)
    found: tuple[Tensor, Tensor, Tensor] = _LinearLoss.apply(
        *(hidden, projection.weight, projection.bias),
        *(projection, target, weights, backward_passes, labelled),
    )
    return found


def _goes_by_classes(hidden: Tensor, projection: Projection) -> bool:
    """Return whether blocks of classes are the better way: no product twice, or less memory.

    Chunks of items need the weight's gradient in float32, and read and write it once a chunk. A
    CPU has few rows a chunk, and no use for a scratch buffer beyond its caches. A `block_size` asks
    for them.
    """
    weight, dtype = projection.weight, projection.dtype
    assert dtype is not None
    if projection.block_size is not None:
        return True
    if hidden.is_cpu or projection.chunk_size is not None or torch.compiler.is_compiling():
        return False
    if not weight.requires_grad:
        return False
    beside = weight.numel() * accumulation_dtype(dtype).itemsize - weight.nbytes
    return beside > BUDGET // 2 or make_plan(hidden, projection).keeps_all


class _BlockTerms(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        target: Target,
        backward_passes: int,
    ) -> tuple[Tensor, Tensor]:
        projection = projection._replace(weight=weight.detach(), bias=_detach(bias))
        plan = make_plan(hidden, projection)
        nll, kl, ctx.kept = collect_blocks(hidden, projection, target, plan)
        ctx.save_for_backward(hidden, weight, bias, ctx.kept.statistics)
        ctx.projection, ctx.options = projection, (target, backward_passes)
        ctx.set_materialize_grads(False)
        return nll, kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, unpack: Unpack, grad_nll: Tensor | None, grad_kl: Tensor | None) -> Any:
        hidden, weight, bias, _ = unpack()
        target, backward_passes = ctx.options
        grads = TermGradients(grad_nll, None if hidden.shape[0] == 1 else grad_kl)
        if all(grad is None for grad in grads):
            return (None,) * 6
        projection = ctx.projection._replace(weight=weight.detach(), bias=_detach(bias))
        kept, ctx.kept = ctx.kept, None
        if kept is None:  # a second backward: the first has overwritten what was kept
            plan = make_plan(hidden, projection, keeps=False)
            kept = collect_blocks(hidden, projection, target, plan)[-1]
        factor = None
        if projection.dtype == torch.float16:
            # A number of items may be divided out already: float16 gets numbers near 1.
            grads, factor = _near_one(grads)
        gradients = grade_blocks(
            *(hidden, projection, target, kept, grads, backward_passes),
            Wanted(*ctx.needs_input_grad[:3]),
        )
        del kept
        if factor is not None:
            gradients = Gradients(*(x if x is None else x.mul_(factor) for x in gradients))
        hidden_gradient = gradients.hidden
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return hidden_gradient, gradients.weight, gradients.bias, None, None, None


def _near_one(grads: TermGradients) -> tuple[TermGradients, Tensor]:
    """Divide by a power of 2, which float16 multiplies by without a further rounding."""
    given = [grad for grad in grads if grad is not None]
    largest = torch.cat([*given, given[0].new_zeros(1)]).abs().max()
    mantissa, _ = torch.frexp(largest)
    factor = torch.where(largest == 0, 1, largest / mantissa).clamp(2**-14, 2**15)
    return TermGradients(*(None if grad is None else grad / factor for grad in grads)), factor


class _LinearLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        target: Target,
        weights: tuple[Weight, Weight],
        backward_passes: int,
        labelled: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # What autograd follows is kept through save_for_backward alone.
        projection = projection._replace(weight=weight.detach(), bias=_detach(bias))
        options = (target, weights, backward_passes, labelled, Wanted(*ctx.needs_input_grad[:3]))
        nll, kl, ctx.gradients = _weighted_terms(hidden, projection, *options)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.options, ctx.projection = options, projection
        total, nll, kl = _sum_up(nll, kl, weights, labelled)
        ctx.mark_non_differentiable(nll, kl)
        ctx.set_materialize_grads(False)
        return total, nll, kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, unpack: Unpack, grad: Tensor | None, *unused: Any) -> Any:
        if grad is None:
            return (None,) * 8
        # Autograd clones what anybody else still refers to.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward: the first has given its gradients away
            hidden, weight, bias = unpack()
            projection = ctx.projection._replace(weight=weight, bias=bias)
            gradients = _weighted_terms(hidden, projection, *ctx.options)[-1]
        return *_multiplied(gradients, grad), *(None,) * 5


class _LinearTerms(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        target: Target,
        backward_passes: int,
    ) -> tuple[Tensor, Tensor]:
        projection = projection._replace(weight=weight.detach(), bias=_detach(bias))
        nll, kl, _ = linear_chunks(hidden, projection, target)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.projection, ctx.options = projection, (target, backward_passes)
        ctx.set_materialize_grads(False)
        return nll, kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, unpack: Unpack, grad_nll: Tensor | None, grad_kl: Tensor | None) -> Any:
        hidden, weight, bias = unpack()
        target, backward_passes = ctx.options
        grads = [grad_nll, None if hidden.shape[0] == 1 else grad_kl]
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * 6
        # A number of items may be divided out already: half precision gets numbers near 1.
        factor = torch.cat([*given, given[0].new_zeros(1)]).abs().max()
        factor = torch.where(factor == 0, 1, factor)
        grad_nll, grad_kl = (None if grad is None else grad / factor for grad in grads)
        gradients = linear_chunks(
            hidden,
            ctx.projection._replace(weight=weight, bias=bias),
            target,
            TermGradients(grad_nll, grad_kl),
            backward_passes,
            Wanted(*ctx.needs_input_grad[:3]),
        )[-1]
        return *_multiplied(gradients, factor), None, None, None


def _weighted_terms(
    hidden: Tensor,
    projection: Projection,
    target: Target,
    weights: tuple[Weight, Weight],
    backward_passes: int,
    labelled: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Gradients]:
    ones = hidden.new_ones(hidden.shape[1], dtype=accumulation_dtype(hidden.dtype))
    grad_nll, grad_kl = (None if weight is None else ones * weight for weight in weights)
    if grad_nll is not None and labelled is not None:
        grad_nll = grad_nll * labelled
    grads = TermGradients(grad_nll, grad_kl)
    return linear_chunks(hidden, projection, target, grads, backward_passes, wanted)


def _multiplied(gradients: Gradients, factor: Tensor) -> tuple[Tensor | None, ...]:
    """Multiply in float32 at least; the caller gives the gradients away."""
    wide = torch.promote_types(factor.dtype, torch.float32)
    return tuple(
        None
        if gradient is None
        else gradient.mul_(factor)
        if gradient.dtype == wide
        else (gradient.to(wide) * factor).to(gradient.dtype)
        for gradient in gradients
    )


def _sum_up(
    nll: Tensor, kl: Tensor, weights: tuple[Weight, Weight], labelled: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sum of both terms, and both sums without weight and gradient."""
    if labelled is not None:
        # An item that is left out may have any NLL, an infinite one too.
        nll = nll.masked_fill(~labelled, 0)
    nll, kl = nll.sum(), kl.sum()
    return mix(nll, kl, *weights), nll.detach(), kl.detach()


def _needs_gradient(hidden: Tensor, projection: Projection) -> bool:
    tensors = (hidden, projection.weight, projection.bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _refuse_transforms(hidden: Tensor, projection: Projection) -> None:
    missing = None
    if has_tangent(hidden, projection.weight, projection.bias):
        missing = "no forward-mode derivative"
    elif is_transformed():
        missing = "no rule for torch.func (grad, vmap)"
    if missing is not None:
        raise ValueError(
            f"the fused linear layer has {missing}; take rdrop_cross_entropy of explicit logits, "
            "torch.nn.functional.linear(hidden, weight, bias)"
        )


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
