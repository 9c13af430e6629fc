"""The R-Drop terms behind a linear layer, a chunk of items at a time: full logits never exist.

All passes of an item are in one chunk. A chunk's logits are computed, compared, and overwritten
with their gradient (the closed form of `chunked.py`), which two more products turn into those of
the hidden states and of the weight. Where the weights of both terms are known beforehand, as in a
mean, all of that happens in the forward and the backward only scales; else the backward computes
the logits again.

Half precision multiplies matrices in half precision and does the rest in float32: gradients of
logits are never divided by a number of items before they are cast, since in float16 they would
underflow, and the weight's gradient is summed over chunks in float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from regdrop.kernels.chunked import backward_blocks, forward_blocks, row_blocks
from regdrop.kernels.closed_form import accumulator, scale_gradients
from regdrop.kernels.target import Target

# Rows a chunk, all passes together. Every chunk reads and writes the weight's gradient once: with
# fewer rows that costs more than the products do, the sooner the faster a device multiplies.
_SMALLEST_CHUNK = 256
_SMALLEST_CHUNK_ON_DEVICES = 1024


class Projection(NamedTuple):
    """From hidden states h to logits, `cap(scale * (h weight^T + bias))`, and how that is computed.

    Attributes:
        weight: (C, features).
        bias: (C,) or None.
        scale: A number that multiplies the logits.
        softcap: Bound c of the logits, `c * tanh(x / c)`, or None.
        chunk_size: Items a chunk; None chooses.
        dtype: The dtype of the products; None takes autocast's, or that of the tensors.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    chunk_size: int | None = None
    dtype: torch.dtype | None = None


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


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
    """
    projection = _with_dtype(hidden, projection)
    if not _needs_gradient(hidden, projection):
        nll, kl, _ = _work(hidden, projection, target)
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
            None leaves it out.
        kl_weight: Weight of the divergence, likewise.
        backward_passes: As in `linear_terms`.

    Returns:
        The sum, a scalar, and the detached terms of each item, both (N,).
    """
    projection = _with_dtype(hidden, projection)
    weights = (nll_weight, kl_weight)
    if not _needs_gradient(hidden, projection):
        nll, kl, _ = _work(hidden, projection, target)
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
    @once_differentiable
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
        nll, kl, _ = _work(hidden, projection, target)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.projection, ctx.options = projection, (target, backward_passes)
        ctx.set_materialize_grads(False)
        return nll, kl

    @staticmethod
    @once_differentiable
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
        gradients = _work(
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
) -> tuple[Tensor, Tensor, _Gradients]:
    ones = hidden.new_ones(hidden.shape[1], dtype=accumulator(hidden.dtype))
    grad_nll, grad_kl = (None if weight is None else ones * weight for weight in weights)
    return _work(hidden, projection, target, (grad_nll, grad_kl), backward_passes, wanted)


@torch.no_grad()
def _work(
    hidden: Tensor,
    projection: Projection,
    target: Target,
    grads: tuple[Tensor | None, Tensor | None] = (None, None),
    backward_passes: int = 1,
    wanted: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor, _Gradients]:
    """Go through the items in chunks.

    Args:
        hidden: (num_passes, N, features).
        projection: The layer, its dtype given.
        target: What the N items are compared with.
        grads: The gradient of each item's likelihood and divergence, (N,) or None.
        backward_passes: The first passes that carry the gradient.
        wanted: Whether hidden, weight and bias need a gradient.

    Returns:
        The terms of each item, and the gradients: the weight's and the bias's in float32 at least.
    """
    num_passes, num_items, features = hidden.shape
    classes, dtype = projection.weight.shape[0], projection.dtype
    assert dtype is not None
    wide = accumulator(dtype)
    weight, bias = projection.weight.to(dtype), projection.bias
    bias = None if bias is None else bias.to(dtype)
    terms = hidden.new_zeros(2, num_items, dtype=wide)
    is_graded = any(wanted) and any(grad is not None for grad in grads)
    gradients = _Gradients(
        torch.zeros_like(hidden) if wanted[0] else None,
        torch.zeros_like(weight, dtype=wide) if wanted[1] else None,
        hidden.new_zeros(classes, dtype=wide) if wanted[2] else None,
    )
    size = _chunk_size(hidden, projection)
    # Memory that was touched before is cheaper than new memory: all chunks share their buffers.
    buffer = hidden.new_empty(num_passes * size, classes, dtype=dtype)
    scratch = torch.empty_like(weight) if wanted[1] and dtype != wide else None
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, num_items, size):
            stop = min(start + size, num_items)
            rows = hidden[:, start:stop].to(dtype).reshape(-1, features)
            products = _product(rows, weight, bias, out=buffer[: len(rows)])
            passes = products.view(num_passes, stop - start, classes)
            for low, high in row_blocks(passes):
                items = slice(start + low, start + high)
                grad_nll, grad_kl = (None if grad is None else grad[items] for grad in grads)
                terms[:, items] = _compare(
                    passes[:, low:high],
                    projection,
                    target.rows(items.start, items.stop),
                    (grad_nll, grad_kl) if is_graded else (None, None),
                    backward_passes,
                )
            if is_graded:
                graded, items = backward_passes * (stop - start), slice(start, stop)
                _accumulate(gradients, products[:graded], rows[:graded], weight, items, scratch)
    return terms[0], terms[1], gradients


def _compare(
    products: Tensor,
    projection: Projection,
    target: Target,
    grads: tuple[Tensor | None, Tensor | None],
    backward_passes: int,
) -> Tensor:
    """Return the terms of a block of items, (2, n), and overwrite its products by their gradient.

    Args:
        products: (num_passes, n, C), a part of the buffer.
        projection: What makes logits of them.
        target: What the n items are compared with.
        grads: The gradient of each item's likelihood and divergence; without one the products are
            of no further use.
        backward_passes: The first passes that carry the gradient.
    """
    logits = _shaped(products, projection)
    nll, kl, statistics = forward_blocks(logits, target)
    if any(grad is not None for grad in grads):
        slope = _slope(logits, projection)
        scaled = scale_gradients(*grads, len(logits), backward_passes)
        backward_blocks(logits, logits, target, statistics, *scaled, backward_passes)
        if slope is not None:
            logits.mul_(slope)
        if logits.dtype != products.dtype:
            products.copy_(logits)
    return torch.stack([nll, kl])


def _accumulate(
    gradients: _Gradients,
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    items: slice,
    scratch: Tensor | None,
) -> None:
    """Add what a chunk's gradient of the products, (rows, C), gives to the other gradients.

    `scratch`, of the weight's shape, takes a product that is added in another dtype than its own.
    """
    if gradients.hidden is not None:
        out = gradients.hidden[: len(rows) // (items.stop - items.start), items]
        out.copy_((grad @ weight).view(out.shape))
    if gradients.weight is not None:
        if scratch is None:
            gradients.weight.addmm_(grad.t(), rows)
        else:
            gradients.weight.add_(torch.mm(grad.t(), rows, out=scratch))
    if gradients.bias is not None:
        gradients.bias.add_(grad.sum(0, dtype=gradients.bias.dtype))


def project(hidden: Tensor, projection: Projection) -> Tensor:
    """Return the logits themselves, (..., C), without a gradient: those of a few items."""
    projection = _with_dtype(hidden, projection)
    weight, bias, *_, dtype = projection
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.to(dtype).reshape(-1, hidden.shape[-1])
        products = _product(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        return _shaped(products, projection).view(*hidden.shape[:-1], -1)


def _product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def _shaped(products: Tensor, projection: Projection) -> Tensor:
    """Return the logits that products give, in place where their dtype can hold them."""
    if projection.scale == 1 and projection.softcap is None:
        return products
    logits = products.to(accumulator(products.dtype)).mul_(projection.scale)
    if projection.softcap is None:
        return logits
    return logits.div_(projection.softcap).tanh_().mul_(projection.softcap)


def _slope(logits: Tensor, projection: Projection) -> Tensor | float | None:
    """Return the derivative of the logits with respect to the products."""
    if projection.softcap is None:
        return None if projection.scale == 1 else projection.scale
    return logits.div(projection.softcap).square_().neg_().add_(1).mul_(projection.scale)


def _scaled(gradients: _Gradients, factor: Tensor) -> tuple[Tensor | None, ...]:
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
        if weight is not None:
            total = total + term.sum() * weight
    return total


def _chunk_size(hidden: Tensor, projection: Projection) -> int:
    """Return the items a chunk, so that its logits take no more memory than the hidden states."""
    num_passes, num_items, features = hidden.shape
    size = projection.chunk_size
    if size is None:
        smallest = _SMALLEST_CHUNK if hidden.is_cpu else _SMALLEST_CHUNK_ON_DEVICES
        # Half precision adds to the weight's gradient by way of a product of its own.
        smallest *= 1 if projection.dtype in (torch.float32, torch.float64) else 2
        rows = max(smallest, num_passes * num_items * features // len(projection.weight))
        size = -(-rows // num_passes)
        # Chunks of equal sizes: a small last one would cost as much as a whole one.
        size = -(-num_items // max(1, -(-num_items // size)))
    return max(1, min(size, num_items))


def _with_dtype(hidden: Tensor, projection: Projection) -> Projection:
    if projection.dtype is not None:
        return projection
    device, dtype = hidden.device.type, hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return projection._replace(dtype=dtype)


def _needs_gradient(hidden: Tensor, projection: Projection) -> bool:
    tensors = (hidden, projection.weight, projection.bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
