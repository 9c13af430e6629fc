"""The R-Drop terms in closed form on a GPU: one kernel each way, written in Triton.

The forward takes the rows of one item, one of every pass, block by block of classes, and keeps
running maxima and sums relative to them, so that the logits are read once. The backward has one
program for each block of an item; it reads the block of every pass once and writes it once.
`docs/performance.md` counts the bytes. The formulas are in `closed_form.py`.

A block is two-dimensional, passes by classes, with the passes of a class in one thread: the mean
over passes needs no exchange between threads, and one reduction serves every pass. A number of
passes that is no power of 2 is filled up with rows of zeros.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regdrop.kernels.closed_form import ClosedForm, accumulator
from regdrop.kernels.target import Target

# Elements a block: 32 a thread at 8 warps, 16 to 32 KiB that a program has on their way at once.
_BLOCK_ELEMENTS = 8192


def triton_kernel(device: torch.device) -> ClosedForm:
    """Return the kernel for logits on a device.

    Raises:
        ValueError: For another device than a GPU, unless Triton interprets its kernels.
    """
    if device.type != "cuda" and isinstance(_forward_kernel, triton.JITFunction):
        raise ValueError(
            f"impl='triton' needs logits on a GPU (or TRITON_INTERPRET=1 before triton is "
            f"imported), got {device}; use 'auto' or 'chunked'"
        )
    # The forward has one program an item.
    return ClosedForm(_forward, _backward, least_items=1024)


def _forward(logits: Tensor, target: Target) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    num_passes, num_items, num_classes = logits.shape
    dtype = accumulator(logits.dtype)
    nll, kl, mass = logits.new_empty(3, num_items, dtype=dtype).unbind()
    maximum, inverse_sum, mean_difference = logits.new_empty(
        3, num_passes, num_items, dtype=dtype
    ).unbind()
    statistics = (maximum, inverse_sum, mean_difference, mass)
    if num_items == 0 or num_classes == 0:
        return nll.zero_(), kl.zero_(), statistics
    if target.classes is not None and logits.is_cuda:
        inside = (target.classes >= 0) & (target.classes < num_classes)
        torch._assert_async(inside.all(), "target holds a class index out of range")
    with torch.cuda.device_of(logits):
        _forward_kernel[(num_items,)](
            *(logits, *logits.stride()),
            *_target_arguments(target),
            *(nll, kl, *statistics),
            *(num_items, num_classes),
            **_options(logits, target),
        )
    return nll, kl, statistics


def _backward(
    out: Tensor,
    logits: Tensor,
    target: Target,
    statistics: tuple[Tensor, ...],
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
) -> None:
    num_items, num_classes = logits.shape[1:]
    if logits.numel() == 0:
        return
    options = _options(logits, target)
    blocks = triton.cdiv(num_classes, options["BLOCK"])
    with torch.cuda.device_of(logits):
        _backward_kernel[(num_items * blocks,)](
            *(out, *out.stride()),
            *(logits, *logits.stride()),
            *_target_arguments(target),
            *statistics,
            *(grad_nll, grad_kl),
            *(num_items, num_classes, blocks),
            BACKWARD_PASSES=backward_passes,
            **options,
        )


def _target_arguments(target: Target) -> tuple[Tensor | int | None, ...]:
    target = target.resolved()
    probabilities = target.probabilities
    strides = (0, 0) if probabilities is None else probabilities.stride()
    weight = None if target.weight is None else target.weight.contiguous()
    return (target.classes, probabilities, *strides, weight, target.valid)


def _options(logits: Tensor, target: Target) -> dict[str, Any]:
    """Return what is compiled in, and the number of warps."""
    num_passes, _, num_classes = logits.shape
    rows = triton.next_power_of_2(num_passes)
    block = min(triton.next_power_of_2(num_classes), max(1, _BLOCK_ELEMENTS // rows))
    return {
        "LABEL_SMOOTHING": float(target.label_smoothing),
        "PASSES": num_passes,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": max(1, min(8, rows * block // 1024)),
        "enable_fp_fusion": True,
    }


@triton.jit
def _load_block(
    logits: tl.tensor,
    stride_pass: tl.tensor,
    stride_item: tl.tensor,
    stride_class: tl.tensor,
    item: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    dtype: tl.dtype,
    PASSES: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """Return the classes `columns` of an item's passes, (ROWS, BLOCK); -inf outside."""
    # Offsets beyond 2^31 elements are usual: in 64 bits.
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
    pointers = logits + rows * stride_pass + item.to(tl.int64) * stride_item
    pointers += columns.to(tl.int64)[None, :] * stride_class
    z = tl.load(pointers, mask=(rows < PASSES) & inside[None, :], other=-float("inf")).to(dtype)
    if ROWS > PASSES:
        z = tl.where(rows < PASSES, z, 0)  # contributes nothing to a sum over passes
    return z


@triton.jit
def _mean_of_passes(x: tl.tensor, PASSES: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """Return the mean over passes of numbers of at most 0, finite where all of them are."""
    # A mask is often the least finite number, whose sum would not be. A power of 2 rounds nothing.
    mean = tl.sum(x * (1 / ROWS), 0)
    if ROWS > PASSES:
        # Nor must rounding take the mean below all of them.
        mean = tl.maximum(mean * (ROWS / PASSES), tl.min(x, 0))
    return mean


@triton.jit
def _difference(x: tl.tensor, PASSES: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """Return x_i - mean_j x_j; 0 where a class is masked in every pass."""
    difference = x - _mean_of_passes(x, PASSES, ROWS)[None, :]
    return tl.where(difference == difference, difference, 0)


@triton.jit
def _spread(
    probabilities: tl.tensor,
    stride_item: tl.tensor,
    stride_class: tl.tensor,
    weight: tl.tensor,
    item: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    num_classes: tl.tensor,
    dtype: tl.dtype,
    LABEL_SMOOTHING: tl.constexpr,
) -> tl.tensor:
    """Return the target's mass on the classes `columns`, but for that on the class index itself."""
    mass = tl.zeros_like(columns).to(dtype)
    if LABEL_SMOOTHING > 0:
        mass += LABEL_SMOOTHING / (mass + num_classes)
    if probabilities is not None:
        pointers = probabilities + item.to(tl.int64) * stride_item
        pointers += columns.to(tl.int64) * stride_class
        given = tl.load(pointers, mask=inside, other=0).to(dtype)
        mass += given * (1 - LABEL_SMOOTHING)
    if weight is not None:
        mass *= tl.load(weight + columns, mask=inside, other=0).to(dtype)
    return tl.where(inside, mass, 0)


@triton.jit
def _class_mass(
    weight: tl.tensor, index: tl.tensor, dtype: tl.dtype, LABEL_SMOOTHING: tl.constexpr
) -> tl.tensor:
    """Return the target's mass on the class index itself."""
    mass = tl.full([], 1 - LABEL_SMOOTHING, dtype)
    if weight is not None:
        mass *= tl.load(weight + index).to(dtype)
    return mass


@triton.jit
def _forward_kernel(
    logits: tl.tensor,
    stride_pass: tl.tensor,
    stride_item: tl.tensor,
    stride_class: tl.tensor,
    classes: tl.tensor,
    probabilities: tl.tensor,
    probabilities_stride_item: tl.tensor,
    probabilities_stride_class: tl.tensor,
    weight: tl.tensor,
    valid: tl.tensor,
    nll_out: tl.tensor,
    kl_out: tl.tensor,
    maximum_out: tl.tensor,
    inverse_sum_out: tl.tensor,
    mean_difference_out: tl.tensor,
    mass_out: tl.tensor,
    num_items: tl.tensor,
    num_classes: tl.tensor,
    LABEL_SMOOTHING: tl.constexpr,
    PASSES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    dtype = nll_out.dtype.element_ty
    item = tl.program_id(0)
    counts = item < num_items
    if valid is not None:
        counts = tl.load(valid + item) != 0
    stop = tl.where(counts, num_classes, 0)  # nothing of an ignored item is read
    passes = tl.arange(0, ROWS)
    is_pass = passes < PASSES

    maximum = tl.full([ROWS], -float("inf"), dtype)
    total = tl.zeros([ROWS], dtype)  # of e = exp(z - maximum)
    weighted = tl.zeros([ROWS], dtype)  # of e * difference
    cross = tl.zeros([ROWS], dtype)  # of target * (z - maximum)
    mass = tl.zeros([], dtype)  # of target
    for start in range(0, stop, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < stop
        z = _load_block(
            logits,
            stride_pass,
            stride_item,
            stride_class,
            item,
            columns,
            inside,
            dtype,
            PASSES,
            ROWS,
        )
        # A higher maximum: what was summed is expressed relative to it.
        higher = tl.maximum(maximum, tl.max(z, 1))
        rise = tl.where(maximum == -float("inf"), 0, higher - maximum)
        maximum = higher
        x = z - tl.where(maximum == -float("inf"), 0, maximum)[:, None]
        e = tl.exp(x)
        weighted += total * (-rise - _mean_of_passes(-rise, PASSES, ROWS))
        scale = tl.exp(-rise)
        total = total * scale + tl.sum(e, 1)
        weighted = weighted * scale + tl.sum(e * _difference(x, PASSES, ROWS), 1)
        if LABEL_SMOOTHING > 0 or probabilities is not None:
            spread = _spread(
                probabilities,
                probabilities_stride_item,
                probabilities_stride_class,
                weight,
                item,
                columns,
                inside,
                num_classes,
                dtype,
                LABEL_SMOOTHING,
            )
            product = tl.where(spread[None, :] == 0, 0, spread[None, :] * x)
            cross += tl.sum(product, 1) - mass * rise
            mass += tl.sum(spread, 0)
    if classes is not None:
        index = tl.load(classes + item)
        on_class = _class_mass(weight, index, dtype, LABEL_SMOOTHING)
        pointers = logits + passes.to(tl.int64) * stride_pass + item.to(tl.int64) * stride_item
        pointers += index * stride_class
        at_class = tl.load(pointers, mask=is_pass, other=0).to(dtype)
        cross += on_class * (at_class - maximum)
        mass += on_class

    mean_difference = weighted / total
    nll = tl.sum(tl.where(is_pass, mass * tl.log(total) - cross, 0), 0) / PASSES
    kl = tl.sum(tl.where(is_pass, mean_difference, 0), 0)
    if PASSES > 1:
        kl = kl / (PASSES - 1)
    # A class masked in one pass only is infinitely unlikely there; 0 * inf above hides it.
    kl = tl.where((kl != kl) & (nll == nll), float("inf"), kl)
    tl.store(nll_out + item, tl.where(counts, nll, 0))
    tl.store(kl_out + item, tl.where(counts, kl, 0))
    tl.store(mass_out + item, mass)
    offset = passes.to(tl.int64) * num_items + item
    tl.store(maximum_out + offset, maximum, mask=is_pass)
    tl.store(inverse_sum_out + offset, 1 / total, mask=is_pass)
    tl.store(mean_difference_out + offset, mean_difference, mask=is_pass)


@triton.jit
def _backward_kernel(
    out: tl.tensor,
    out_stride_pass: tl.tensor,
    out_stride_item: tl.tensor,
    out_stride_class: tl.tensor,
    logits: tl.tensor,
    stride_pass: tl.tensor,
    stride_item: tl.tensor,
    stride_class: tl.tensor,
    classes: tl.tensor,
    probabilities: tl.tensor,
    probabilities_stride_item: tl.tensor,
    probabilities_stride_class: tl.tensor,
    weight: tl.tensor,
    valid: tl.tensor,
    maximum_in: tl.tensor,
    inverse_sum_in: tl.tensor,
    mean_difference_in: tl.tensor,
    mass_in: tl.tensor,
    grad_nll: tl.tensor,
    grad_kl: tl.tensor,
    num_items: tl.tensor,
    num_classes: tl.tensor,
    blocks: tl.tensor,
    BACKWARD_PASSES: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    PASSES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write `p (mass a + b (1 - E + d)) - b mean(p) - a target` for the first passes, else 0."""
    dtype = maximum_in.dtype.element_ty
    program = tl.program_id(0)
    item = program // blocks
    counts = item < num_items
    if valid is not None:
        counts = tl.load(valid + item) != 0
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < tl.where(counts, num_classes, 0)
    z = _load_block(
        logits, stride_pass, stride_item, stride_class, item, columns, inside, dtype, PASSES, ROWS
    )
    passes = tl.arange(0, ROWS)
    offset = passes.to(tl.int64) * num_items + item
    is_pass = passes < PASSES
    maximum = tl.load(maximum_in + offset, mask=is_pass, other=0)
    inverse_sum = tl.load(inverse_sum_in + offset, mask=is_pass, other=0)
    x = z - maximum[:, None]
    p = tl.exp(x) * inverse_sum[:, None]
    slope = tl.zeros([ROWS], dtype)
    if grad_nll is not None:
        a = tl.load(grad_nll + item)
        slope += a * tl.load(mass_in + item)
    if grad_kl is not None:
        b = tl.load(grad_kl + item)
        mean_difference = tl.load(mean_difference_in + offset, mask=is_pass, other=0)
        slope += b * (1 - mean_difference)
        grad = p * (slope[:, None] + b * _difference(x, PASSES, ROWS))
        grad -= (b * (1 / PASSES) * tl.sum(p, 0))[None, :]
    else:
        grad = p * slope[:, None]
    if grad_nll is not None:
        if LABEL_SMOOTHING > 0 or probabilities is not None:
            spread = _spread(
                probabilities,
                probabilities_stride_item,
                probabilities_stride_class,
                weight,
                item,
                columns,
                inside,
                num_classes,
                dtype,
                LABEL_SMOOTHING,
            )
            grad -= (a * spread)[None, :]
        if classes is not None:
            index = tl.load(classes + item)
            on_class = a * _class_mass(weight, index, dtype, LABEL_SMOOTHING)
            grad -= tl.where(columns == index, on_class, 0)[None, :]
    rows = passes[:, None]
    grad = tl.where((rows < BACKWARD_PASSES) & counts, grad, 0)
    pointers = out + rows.to(tl.int64) * out_stride_pass + item.to(tl.int64) * out_stride_item
    pointers += columns.to(tl.int64)[None, :] * out_stride_class
    tl.store(pointers, grad.to(out.dtype.element_ty), (rows < PASSES) & (columns < num_classes))
