"""The products of a linear layer and the R-Drop terms behind it, a chunk of items at a time.

All passes of an item are in one chunk. A chunk's logits are computed, compared, and overwritten
with their gradient by a kernel of the closed form; two more products turn that into the gradients
of the hidden states and of the weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from regdrop.kernels.chunked import row_blocks
from regdrop.kernels.closed_form import ClosedForm, accumulator, scale_gradients
from regdrop.kernels.selection import Implementation, closed_form_kernel
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
        impl: What computes the terms from a chunk's logits, as in `closed_form_kernel`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    chunk_size: int | None = None
    dtype: torch.dtype | None = None
    impl: Implementation = "auto"


class Gradients(NamedTuple):
    """Gradients of the layer's input and of its parameters; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def work_in_chunks(
    hidden: Tensor,
    projection: Projection,
    target: Target,
    grads: tuple[Tensor | None, Tensor | None] = (None, None),
    backward_passes: int = 1,
    wanted: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor, Gradients]:
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
    # The first chunk writes the parameters' gradients, the others add to them.
    new = hidden.new_empty if is_graded and num_items else hidden.new_zeros
    gradients = Gradients(
        torch.zeros_like(hidden) if wanted[0] else None,
        new(weight.shape, dtype=wide) if wanted[1] else None,
        new(classes, dtype=wide) if wanted[2] else None,
    )
    kernel = closed_form_kernel(projection.impl, hidden.device)
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
            for low, high in row_blocks(passes, kernel.least_items):
                items = slice(start + low, start + high)
                grad_nll, grad_kl = (None if grad is None else grad[items] for grad in grads)
                terms[:, items] = _compare(
                    passes[:, low:high],
                    kernel,
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
    kernel: ClosedForm,
    projection: Projection,
    target: Target,
    grads: tuple[Tensor | None, Tensor | None],
    backward_passes: int,
) -> Tensor:
    """Return the terms of a block of items, (2, n), and overwrite its products by their gradient.

    Args:
        products: (num_passes, n, C), a part of the buffer.
        kernel: What computes the terms and their gradient.
        projection: What makes logits of them.
        target: What the n items are compared with.
        grads: The gradient of each item's likelihood and divergence; without one the products are
            of no further use.
        backward_passes: The first passes that carry the gradient.
    """
    logits = _shaped(products, projection)
    nll, kl, statistics = kernel.forward(logits, target)
    if any(grad is not None for grad in grads):
        slope = _slope(logits, projection)
        scaled = scale_gradients(*grads, len(logits), backward_passes)
        kernel.backward(logits, logits, target, statistics, *scaled, backward_passes)
        if slope is not None:
            logits.mul_(slope)
        if logits.dtype != products.dtype:
            products.copy_(logits)
    return torch.stack([nll, kl])


def _accumulate(
    gradients: Gradients,
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    items: slice,
    scratch: Tensor | None,
) -> None:
    """Add what a chunk's gradient of the products, (rows, C), gives to the other gradients.

    `scratch`, of the weight's shape, takes a product that is added in another dtype than its own.
    """
    is_first = items.start == 0
    if gradients.hidden is not None:
        out = gradients.hidden[: len(rows) // (items.stop - items.start), items]
        out.copy_((grad @ weight).view(out.shape))
    if gradients.weight is not None:
        if scratch is None:
            gradients.weight.addmm_(grad.t(), rows, beta=0 if is_first else 1)
        else:
            product = torch.mm(grad.t(), rows, out=scratch)
            _write(gradients.weight, product, is_first)
    if gradients.bias is not None:
        _write(gradients.bias, grad.sum(0, dtype=gradients.bias.dtype), is_first)


def _write(total: Tensor, part: Tensor, is_first: bool) -> None:
    if is_first:
        total.copy_(part)
    else:
        total.add_(part)


def project(hidden: Tensor, projection: Projection) -> Tensor:
    """Return the logits themselves, (..., C), without a gradient: those of a few items."""
    projection = with_dtype(hidden, projection)
    weight, bias, dtype = projection.weight, projection.bias, projection.dtype
    assert dtype is not None
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


def with_dtype(hidden: Tensor, projection: Projection) -> Projection:
    """Return a projection whose dtype is given: its own, autocast's, or that of the states."""
    if projection.dtype is not None:
        return projection
    device, dtype = hidden.device.type, hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return projection._replace(dtype=dtype)
