"""The R-Drop terms behind a linear layer, with autograd around them: full logits never exist.

`linear_chunks.py` goes through the items. Where the weights of both terms are known beforehand, as
in a mean, it computes the gradient in the forward, and the backward only scales; else the backward
computes the logits again.

Half precision multiplies matrices in half precision and does the rest in float32: gradients of
logits are never divided by a number of items before they are cast, since in float16 they would
underflow, and the weight's gradient is summed over chunks in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from regdrop.kernels.closed_form import accumulator
from regdrop.kernels.gradient import differentiable_once, has_tangent
from regdrop.kernels.linear_chunks import Gradients, Projection, with_dtype, work_in_chunks
from regdrop.kernels.target import Target


def linear_terms(
    hidden: Tensor, projection: Projection, target: Target, *, backward_passes: int
) -> tuple[Tensor, Tensor]:
    """Return each item's likelihood and divergence; the backward computes the logits again.

    Args:
        hidden: (num_passes, N, features).
        projection: The layer; its tensors get gradients too.
        target: Class indices of the N items, all of which count; gets no gradient.
        backward_passes: The first passes that carry the gradient, times num_passes / this.

    Returns:
        The negative log-likelihood, mean over passes, and the symmetric KL, mean over pairs of
        passes, both (N,), in float32 at least.

    Raises:
        ValueError: In forward-mode differentiation.
    """
    _refuse_forward_mode(hidden, projection)
    projection = with_dtype(hidden, projection)
    if not _needs_gradient(hidden, projection):
        nll, kl, _ = work_in_chunks(hidden, projection, target)
    else:
        nll, kl = _LinearTerms.apply(
            hidden, projection.weight, projection.bias, projection, target, backward_passes
        )
    return nll, kl


def linear_loss(
    hidden: Tensor,
    projection: Projection,
    target: Target,
    *,
    nll_weight: Tensor | float | None,
    kl_weight: Tensor | float | None,
    backward_passes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weighted sum of both terms over items, whose gradient the forward computes.

    Args:
        hidden: As in `linear_terms`.
        projection: As in `linear_terms`.
        target: As in `linear_terms`.
        nll_weight: Weight of the likelihood, near 1 so that half precision holds the gradient;
            one for all items or one each, (N,), where 0 leaves an item out; None leaves it out.
        kl_weight: Weight of the divergence, likewise.
        backward_passes: As in `linear_terms`.

    Returns:
        The sum, a scalar, and the detached terms of each item, both (N,).

    Raises:
        ValueError: In forward-mode differentiation.
    """
    _refuse_forward_mode(hidden, projection)
    projection = with_dtype(hidden, projection)
    weights = (nll_weight, kl_weight)
    if not _needs_gradient(hidden, projection):
        nll, kl, _ = work_in_chunks(hidden, projection, target)
        return _weighted_sum(nll, kl, weights), nll, kl
    total, nll, kl = _LinearLoss.apply(
        hidden, projection.weight, projection.bias, projection, target, weights, backward_passes
    )
    return total, nll, kl


class _LinearLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        target: Target,
        weights: tuple[Tensor | float | None, Tensor | float | None],
        backward_passes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # What autograd follows is kept through save_for_backward alone.
        projection = projection._replace(weight=weight.detach(), bias=_detach(bias))
        options = (target, weights, backward_passes, ctx.needs_input_grad[:3])
        nll, kl, ctx.gradients = _work_weighted(hidden, projection, *options)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.options, ctx.projection = options, projection
        ctx.mark_non_differentiable(nll, kl)
        ctx.set_materialize_grads(False)
        return _weighted_sum(nll, kl, weights), nll, kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> Any:
        if grad is None:
            return (None,) * 7
        # Autograd clones what anybody else still refers to.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward: the first has given its gradients away
            hidden, weight, bias = ctx.saved_tensors
            projection = ctx.projection._replace(weight=weight, bias=bias)
            gradients = _work_weighted(hidden, projection, *ctx.options)[-1]
        return *_scaled(gradients, grad), None, None, None, None


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
        nll, kl, _ = work_in_chunks(hidden, projection, target)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.projection, ctx.options = projection, (target, backward_passes)
        ctx.set_materialize_grads(False)
        return nll, kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_nll: Tensor | None, grad_kl: Tensor | None) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        target, backward_passes = ctx.options
        grads = [grad_nll, None if hidden.shape[0] == 1 else grad_kl]
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * 6
        # A number of items may be divided out already: half precision gets numbers near 1.
        factor = torch.cat([*given, given[0].new_zeros(1)]).abs().max()
        factor = torch.where(factor == 0, 1, factor)
        grad_nll, grad_kl = (None if grad is None else grad / factor for grad in grads)
        gradients = work_in_chunks(
            hidden,
            ctx.projection._replace(weight=weight, bias=bias),
            target,
            (grad_nll, grad_kl),
            backward_passes,
            ctx.needs_input_grad[:3],
        )[-1]
        return *_scaled(gradients, factor), None, None, None


def _work_weighted(
    hidden: Tensor,
    projection: Projection,
    target: Target,
    weights: tuple[Tensor | float | None, Tensor | float | None],
    backward_passes: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Gradients]:
    ones = hidden.new_ones(hidden.shape[1], dtype=accumulator(hidden.dtype))
    grad_nll, grad_kl = (None if weight is None else ones * weight for weight in weights)
    return work_in_chunks(hidden, projection, target, (grad_nll, grad_kl), backward_passes, wanted)


def _scaled(gradients: Gradients, factor: Tensor) -> tuple[Tensor | None, ...]:
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


def _weighted_sum(
    nll: Tensor, kl: Tensor, weights: tuple[Tensor | float | None, Tensor | float | None]
) -> Tensor:
    total = nll.new_zeros(())
    for term, weight in zip((nll, kl), weights, strict=True):
        if isinstance(weight, Tensor) and weight.dim():
            # An item that is left out may have any term, an infinite one too.
            total = total + (term.masked_fill(weight == 0, 0) * weight).sum()
        elif weight is not None:
            total = total + term.sum() * weight
    return total


def _needs_gradient(hidden: Tensor, projection: Projection) -> bool:
    tensors = (hidden, projection.weight, projection.bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _refuse_forward_mode(hidden: Tensor, projection: Projection) -> None:
    if has_tangent(hidden, projection.weight, projection.bias):
        raise ValueError(
            "the fused linear layer has no forward-mode derivative; take rdrop_cross_entropy of "
            "explicit logits, torch.nn.functional.linear(hidden, weight, bias)"
        )


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
