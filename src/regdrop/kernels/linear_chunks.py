"""The products of a linear layer and the R-Drop terms behind it, a chunk of items at a time.

All passes of an item are in one chunk. A chunk's logits are computed, compared, and overwritten
with their gradient by a kernel of the closed form; two more products turn that into the gradients
of the hidden states and of the weight.
"""

import torch
from torch import Tensor

from regdrop.kernels.chunked import row_blocks
from regdrop.kernels.class_blocks import BUDGET
from regdrop.kernels.closed_form import ClosedForm, pass_slopes
from regdrop.kernels.precision import accumulation_dtype
from regdrop.kernels.projection import (
    Gradients,
    Projection,
    TermGradients,
    Wanted,
    add_product,
    adds_in_float32,
    logits_slope,
    multiply,
    shape_logits,
    without_autocast,
)
from regdrop.kernels.selection import select_kernel
from regdrop.kernels.target import Target

# Rows a chunk, all passes together. Every chunk reads and writes the weight's gradient once: with
# fewer rows that costs more than the products do, the sooner the faster a device multiplies.
_SMALLEST_CHUNK = 256
_SMALLEST_CHUNK_ON_DEVICES = 512


NO_GRADIENTS, NOTHING_WANTED = TermGradients(None, None), Wanted(False, False, False)


@torch.no_grad()
def chunked_linear_terms(
    hidden: Tensor,
    projection: Projection,
    target: Target,
    grads: TermGradients = NO_GRADIENTS,
    backward_passes: int = 1,
    wanted: Wanted = NOTHING_WANTED,
) -> tuple[Tensor, Tensor, Gradients]:
    """Compute the terms of all items, and the gradients that are wanted, a chunk at a time.

    Args:
        hidden: (num_passes, N, features).
        projection: The layer, its dtype given.
        target: What the N items are compared with.
        grads: The gradient of each item's terms, (N,).
        backward_passes: The first passes that carry the gradient.
        wanted: What needs a gradient.

    Returns:
        The terms of each item, and the gradients: the weight's and the bias's in float32 at least.
    """
    num_passes, num_items, features = hidden.shape
    classes, dtype = projection.weight.shape[0], projection.dtype
    assert dtype is not None
    wide = accumulation_dtype(dtype)
    weight, bias = projection.weight.to(dtype), projection.bias
    bias = None if bias is None else bias.to(dtype)
    terms = hidden.new_zeros(2, num_items, dtype=wide)
    is_graded = any(wanted) and any(grad is not None for grad in grads)
    # The first chunk writes the parameters' gradients, the others add to them.
    new = hidden.new_empty if is_graded and num_items else hidden.new_zeros
    gradients = Gradients(
        torch.zeros_like(hidden) if wanted.hidden else None,
        new(weight.shape, dtype=wide) if wanted.weight else None,
        new(classes, dtype=wide) if wanted.bias else None,
    )
    kernel = select_kernel(projection.impl, hidden.device, dtype)
    size = _chunk_size(hidden, projection)
    # Memory that was touched before is cheaper than new memory: all chunks share their buffers.
    buffer = hidden.new_empty(num_passes * size, classes, dtype=dtype)
    is_direct = dtype == wide or adds_in_float32(hidden.device, dtype)
    scratch = torch.empty_like(weight) if wanted.weight and not is_direct else None
    with without_autocast(hidden.device):
        for start in range(0, num_items, size):
            stop = min(start + size, num_items)
            rows = hidden[:, start:stop].to(dtype).reshape(-1, features)
            products = multiply(rows, weight, bias, out=buffer[: len(rows)])
            passes = products.view(num_passes, stop - start, classes)
            for low, high in row_blocks(passes, kernel.least_items):
                items = slice(start + low, start + high)
                terms[:, items] = _compare(
                    passes[:, low:high],
                    kernel,
                    projection,
                    target.rows(items.start, items.stop),
                    grads.rows(items) if is_graded else NO_GRADIENTS,
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
    grads: TermGradients,
    backward_passes: int,
) -> Tensor:
    """Return the terms of a block of items, (2, n), and overwrite its products by their gradient.

    Args:
        products: (num_passes, n, C), a part of the buffer.
        kernel: What computes the terms and their gradient.
        projection: What makes logits of them.
        target: What the n items are compared with.
        grads: The gradient of each item's terms; without one the products are of no further use.
        backward_passes: The first passes that carry the gradient.
    """
    logits = shape_logits(products, projection.scale, projection.softcap, inplace=True)
    nll, kl, statistics = kernel.forward(logits, target)
    if any(grad is not None for grad in grads):
        slope = logits_slope(logits, projection.scale, projection.softcap)
        scaled = pass_slopes(*grads, len(logits), backward_passes)
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
        add_product(gradients.weight, grad.t(), rows, is_first=is_first, scratch=scratch)
    if gradients.bias is not None:
        part = grad.sum(0, dtype=gradients.bias.dtype)
        if is_first:
            gradients.bias.copy_(part)
        else:
            gradients.bias.add_(part)


def _chunk_size(hidden: Tensor, projection: Projection) -> int:
    """Return the items a chunk: on a CPU its logits take no more memory than the hidden states."""
    num_passes, num_items, features = hidden.shape
    size, dtype, classes = projection.chunk_size, projection.dtype, len(projection.weight)
    assert dtype is not None
    if size is None:
        is_half = dtype != accumulation_dtype(dtype)
        if hidden.is_cpu:
            # Half precision adds to the weight's gradient by way of a product of its own.
            smallest = _SMALLEST_CHUNK * (2 if is_half else 1)
            rows = max(smallest, num_passes * num_items * features // classes)
        else:
            # Half precision has a gradient of the weight in float32 besides.
            budget = BUDGET // 2 if is_half else BUDGET
            rows = max(_SMALLEST_CHUNK_ON_DEVICES, budget // (classes * dtype.itemsize))
        size = -(-rows // num_passes)
        # Chunks of equal sizes: a small last one would cost as much as a whole one.
        size = -(-num_items // max(1, -(-num_items // size)))
    return max(1, min(size, num_items))
