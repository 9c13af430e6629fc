"""A linear layer and the R-Drop terms behind it, a block of classes at a time.

The forward computes the logits of every block and sums them up by rows. The backward turns a
block's logits into their gradient, and that into the gradient of the block's weight, complete and
written once in its own dtype, and into a part of the gradient of the hidden states.

What decides the cost is which logits are still there in the backward; the others are computed
again, a fourth product besides the three of a linear layer. They are kept in a scratch buffer, and
in the memory that the weight's gradient will take: its rows are written from the first class on,
and the logits of later blocks lie behind them, at its end. `docs/performance-gpu.md` counts both.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from regdrop.kernels.class_columns import ClassRows, Columns, RowSums
from regdrop.kernels.class_rows import assert_classes, class_rows
from regdrop.kernels.closed_form import pass_slopes
from regdrop.kernels.precision import accumulation_dtype
from regdrop.kernels.projection import (
    Gradients,
    Projection,
    TermGradients,
    Wanted,
    add_product,
    multiply,
    without_autocast,
)
from regdrop.kernels.selection import select_kernel
from regdrop.kernels.target import Target

# Bytes above the gradients: of the scratch buffer, and of the sum of the gradient of the hidden
# states, which is wider than itself.
BUDGET = 2**28
# Blocks begin at a multiple of it, where a device reads and multiplies fastest.
_ALIGNED = 128


class Plan(NamedTuple):
    """Which classes' logits are kept until the backward.

    Attributes:
        num_classes: All classes.
        scratch: As many fit in the scratch buffer, and make a block; the first ones are kept there.
        kept: The first classes that are kept at all. Those behind the scratch buffer's lie at the
            end of the memory of the weight's gradient.
    """

    num_classes: int
    scratch: int
    kept: int

    @property
    def keeps_all(self) -> bool:
        """Whether no product is computed twice."""
        return self.kept == self.num_classes

    @property
    def keeps_in_weight(self) -> bool:
        """Whether logits lie in the memory of the weight's gradient."""
        return self.kept > self.scratch

    def kept_blocks(self) -> Iterator[slice]:
        """Return the blocks whose logits are kept, in the order of the classes."""
        return self._blocks(0, self.kept)

    def other_blocks(self) -> Iterator[slice]:
        """Return the blocks whose logits are computed again."""
        return self._blocks(self.kept, self.num_classes)

    def _blocks(self, start: int, stop: int) -> Iterator[slice]:
        size = self.scratch
        return (slice(low, min(low + size, stop)) for low in range(start, stop, size))


class Kept(NamedTuple):
    """What the forward leaves to the backward.

    Attributes:
        statistics: Of each row, as in `RowSums`.
        plan: What lies where.
        scratch: Flat, of the products' dtype.
        weight: Flat, what becomes the weight's gradient; None without logits in it.
    """

    statistics: Tensor
    plan: Plan
    scratch: Tensor
    weight: Tensor | None

    def logits(self, block: slice) -> Tensor:
        """Return the memory of a block's logits, (rows, width)."""
        width, rows = block.stop - block.start, self.scratch.numel() // self.plan.scratch
        memory, start = self.scratch, 0
        if block.start < self.plan.kept:
            start = block.start * rows
        if self.weight is not None and self.plan.scratch <= block.start < self.plan.kept:
            memory = self.weight.view(self.scratch.dtype)
            start = memory.numel() - (self.plan.kept - block.start) * rows
        return memory[start : start + rows * width].view(rows, width)


def make_plan(hidden: Tensor, projection: Projection, *, keeps: bool = True) -> Plan:
    """Plan what is kept.

    Args:
        hidden: (num_passes, N, features).
        projection: The layer, its dtype given.
        keeps: Whether anything is.
    """
    dtype, weight = projection.dtype, projection.weight
    assert dtype is not None
    num_classes, features = weight.shape
    # Bytes a class: of its logits, and of its weight's gradient.
    of_logits = max(1, hidden.shape[0] * hidden.shape[1] * dtype.itemsize)
    of_weight = features * weight.element_size()
    sums = hidden.numel() * max(0, accumulation_dtype(dtype).itemsize - hidden.element_size())
    budget = max(BUDGET - sums, BUDGET // 4)
    size, aligned = projection.block_size, 1
    if size is None:
        size, aligned = max(1, budget // of_logits // _ALIGNED) * _ALIGNED, _ALIGNED
    scratch = min(num_classes, size)
    kept = scratch if keeps else 0
    if keeps and dtype.itemsize <= weight.element_size():
        # When the gradient of a class is written, the logits of those behind it lie behind it.
        others = num_classes - scratch
        stored = min(others, others * of_weight // of_logits)
        kept += stored if stored == others else stored // aligned * aligned
    return Plan(num_classes, scratch, kept)


@torch.no_grad()
def collect_blocks(
    hidden: Tensor, projection: Projection, target: Target, plan: Plan
) -> tuple[Tensor, Tensor, Kept]:
    """Compute the terms.

    Args:
        hidden: (num_passes, N, features).
        projection: The layer, its dtype given.
        target: Class indices of the N items.
        plan: What is kept.

    Returns:
        The terms of each item, (N,), and what is kept.
    """
    num_passes, num_items, features = hidden.shape
    weight, dtype = projection.weight, projection.dtype
    scratch = hidden.new_empty(plan.scratch * num_passes * num_items, dtype=dtype)
    sums = RowSums.empty(scratch.new_empty(num_passes, num_items, 0))
    memory = weight.new_empty(weight.numel()) if plan.keeps_in_weight else None
    kept = Kept(sums.statistics, plan, scratch, memory)
    if num_items == 0:
        return sums.nll, sums.kl, kept
    collect = _rows_kernel(projection, hidden.device).collect
    rows = hidden.to(dtype).reshape(-1, features)
    # Those that are not kept before those that stay in the same memory.
    blocks = [*plan.other_blocks(), *plan.kept_blocks()]
    with without_autocast(hidden.device):
        for i, block in enumerate(blocks):
            logits = _multiply(rows, projection, block, kept.logits(block))
            columns = _columns(logits, projection, block, num_passes)
            collect(columns, target, sums, i == 0, i == len(blocks) - 1)
    assert_classes(target, plan.num_classes)  # while a GPU has work: it costs time of the host
    return sums.nll, sums.kl, kept


@torch.no_grad()
def grade_blocks(
    hidden: Tensor,
    projection: Projection,
    target: Target,
    kept: Kept,
    grads: TermGradients,
    backward_passes: int,
    wanted: Wanted,
) -> Gradients:
    """Compute the gradients.

    Args:
        hidden: (num_passes, N, features).
        projection: The layer, its dtype given.
        target: Class indices of the N items.
        kept: What the forward has left, which is overwritten.
        grads: The gradient of each item's terms, (N,).
        backward_passes: The first passes that carry the gradient.
        wanted: What needs a gradient.

    Returns:
        The gradients, in float32 at least but for the weight's, which is in its own dtype.
    """
    num_passes, num_items, features = hidden.shape
    weight, dtype, plan = projection.weight, projection.dtype, kept.plan
    assert dtype is not None
    wide = accumulation_dtype(dtype)
    memory = weight.new_empty(weight.numel()) if kept.weight is None else kept.weight
    gradients = Gradients(
        hidden.new_zeros(hidden.shape, dtype=wide) if wanted.hidden else None,
        memory.view(weight.shape) if wanted.weight else None,
        hidden.new_zeros(plan.num_classes, dtype=wide) if wanted.bias else None,
    )
    if num_items == 0:
        return gradients._replace(weight=torch.zeros_like(weight) if wanted.weight else None)
    write = _rows_kernel(projection, hidden.device).write
    scaled = pass_slopes(*grads, num_passes, backward_passes)
    rows = hidden.to(dtype).reshape(-1, features)
    graded = backward_passes * num_items
    with without_autocast(hidden.device):
        for block in (*plan.kept_blocks(), *plan.other_blocks()):
            logits = kept.logits(block)
            if block.start >= plan.kept:
                _multiply(rows, projection, block, logits)
            out = logits
            if plan.scratch <= block.start < plan.kept:
                # The gradient of the weight is about to take the memory of the logits.
                out = kept.scratch[: logits.numel()].view(logits.shape)
            columns = _columns(logits, projection, block, num_passes)
            write(
                out.view(columns.products.shape),
                columns,
                target,
                kept.statistics,
                scaled,
                backward_passes,
            )
            grad = out[:graded]
            if gradients.hidden is not None:
                total = gradients.hidden.view(-1, features)[:graded]
                add_product(total, grad, weight[block].to(dtype))
            if gradients.weight is not None:
                add_product(gradients.weight[block], grad.t(), rows[:graded], is_first=True)
            if gradients.bias is not None:
                torch.sum(grad, 0, dtype=wide, out=gradients.bias[block])
    return gradients


def _rows_kernel(projection: Projection, device: torch.device) -> ClassRows:
    dtype = projection.dtype or torch.float32
    return class_rows(select_kernel(projection.impl, device, dtype).class_rows)


def _multiply(rows: Tensor, projection: Projection, block: slice, out: Tensor) -> Tensor:
    """Write the products of a block of classes, (rows, width)."""
    bias = None if projection.bias is None else projection.bias[block].to(rows.dtype)
    return multiply(rows, projection.weight[block].to(rows.dtype), bias, out)


def _columns(logits: Tensor, projection: Projection, block: slice, num_passes: int) -> Columns:
    passes = logits.view(num_passes, -1, logits.shape[-1])
    num_classes = len(projection.weight)
    return Columns(passes, block.start, num_classes, projection.scale, projection.softcap)
