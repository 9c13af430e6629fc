"""The R-Drop terms of a block of classes: sums that go from block to block, and the gradient.

The formulas are in `closed_form.py`. What a row's classes add to the terms are sums relative to a
maximum; those of two blocks are added once both are relative to the higher one. This is the form
in plain PyTorch; `triton_rows.py` has one for a GPU.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from regdrop.kernels.chunked import row_blocks
from regdrop.kernels.class_columns import ClassRows, Columns, RowSums
from regdrop.kernels.precision import accumulation_dtype, mean_of_passes
from regdrop.kernels.projection import logits_slope, shape_logits
from regdrop.kernels.target import Target


class _Sums(NamedTuple):
    maximum: Tensor  # (num_passes, n), as are the next three
    total: Tensor
    weighted: Tensor
    cross: Tensor
    mass: Tensor  # (n,)


def collect_columns(
    columns: Columns, target: Target, sums: RowSums, is_first: bool, is_last: bool
) -> None:
    """Add a block of classes to the sums, as `CollectColumns` describes it."""
    num_passes = len(columns.products)
    for start, stop in row_blocks(columns.products):
        memory = sums.statistics[:, start:stop]
        found = _sum_up(columns.rows(start, stop), target.rows(start, stop))
        if not is_first:
            found = _add(_carried(memory, num_passes), found)
        _keep(found, memory, target.rows(start, stop).valid, is_last)


def combine_shares(shares: list[Tensor], target: Target, sums: RowSums) -> None:
    """Write the terms and the statistics of all classes, of which others have collected shares.

    Args:
        shares: Of each, the memory of its carried sums, which have not seen a last block.
        target: Of all classes.
        sums: What is written.
    """
    num_passes = len(sums.cross)
    found = reduce(_add, (_carried(memory, num_passes) for memory in shares))
    _keep(found, sums.statistics, target.valid, is_last=True)


def _carried(memory: Tensor, num_passes: int) -> _Sums:
    """Return the sums in the memory of a `RowSums`, of all of its rows or some."""
    maximum, total, weighted, (mass,) = _split(memory, num_passes)
    return _Sums(maximum, total, weighted, memory[3 * num_passes + 3 :], mass)


def _keep(found: _Sums, memory: Tensor, valid: Tensor | None, is_last: bool) -> None:
    """Write sums to the memory of a `RowSums`, and after the last block the terms."""
    num_passes = len(found.maximum)
    if is_last:
        nll, kl, found = _finish(found)
        for row, term in enumerate((nll, kl), start=3 * num_passes + 1):
            memory[row].copy_(term if valid is None else torch.where(valid, term, 0))
    for kept, new in zip(_carried(memory, num_passes), found, strict=True):
        kept.copy_(new)


def _split(statistics: Tensor, num_passes: int) -> tuple[Tensor, ...]:
    """Return each pass's maximum, sum and difference, and the target's mass in a dimension more."""
    parts: tuple[Tensor, ...] = statistics[: 3 * num_passes + 1].split([num_passes] * 3 + [1])
    return parts


def _sum_up(columns: Columns, target: Target) -> _Sums:
    z = shape_logits(columns.products, columns.scale, columns.softcap)
    z = z.to(accumulation_dtype(columns.products.dtype))
    maximum = z.amax(-1)
    x = z - torch.where(maximum.isneginf(), 0, maximum)[..., None]
    cross, mass = _target_sums(x, columns, target)
    e = x.exp()
    total = e.sum(-1)
    return _Sums(maximum, total, e.mul_(_difference(x)).sum(-1), cross, mass)


def _target_sums(x: Tensor, columns: Columns, target: Target) -> tuple[Tensor, Tensor]:
    """Return the sums over classes of target * x, (num_passes, n), and of target, (n,)."""
    index, on_class = _target_class(columns, target, x.dtype)
    at_class = x.gather(-1, index.expand(len(x), -1, 1))[..., 0]
    cross = torch.where(on_class == 0, 0, at_class * on_class)
    if not target.label_smoothing:
        return cross, on_class
    spread = _spread(columns, target, x.dtype)
    # A class without a target adds nothing, masked or not.
    return cross + torch.where(spread == 0, 0, x * spread).sum(-1), on_class + spread.sum()


def _target_class(columns: Columns, target: Target, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return each item's class within the block, (1, n, 1), and its mass, 0 if it is elsewhere."""
    assert target.classes is not None
    index = target.classes - columns.first
    is_here = (index >= 0) & (index < columns.products.shape[-1])
    mass = target.class_mass(dtype)
    if not isinstance(mass, Tensor):
        # Of two numbers torch would make one in the default dtype.
        mass = torch.full((), mass, dtype=dtype, device=index.device)
    on_class = torch.where(is_here, mass, 0)
    return index.clamp(0, columns.products.shape[-1] - 1)[None, :, None], on_class


def _spread(columns: Columns, target: Target, dtype: torch.dtype) -> Tensor:
    """Return the mass that label smoothing puts on each class of the block, (width,)."""
    width = columns.products.shape[-1]
    share = columns.products.new_full(
        (width,), target.label_smoothing / columns.num_classes, dtype=dtype
    )
    if target.weight is None:
        return share
    return share * target.weight[columns.first : columns.first + width].to(dtype)


def _add(one: _Sums, other: _Sums) -> _Sums:
    """Return the sums of both, relative to the higher maximum."""
    higher = torch.maximum(one.maximum, other.maximum)
    a, b = _lower(one, higher), _lower(other, higher)
    added = [x + y for x, y in zip(a[1:], b[1:], strict=True)]
    return _Sums(higher, *added)


def _lower(sums: _Sums, higher: Tensor) -> _Sums:
    """Return sums relative to a higher maximum."""
    fall = torch.where(sums.maximum.isneginf(), 0, sums.maximum - higher)
    scale = fall.exp()
    weighted = (sums.weighted + sums.total * _difference(fall)) * scale
    return _Sums(higher, sums.total * scale, weighted, sums.cross + sums.mass * fall, sums.mass)


def _finish(sums: _Sums) -> tuple[Tensor, Tensor, _Sums]:
    mean_difference = sums.weighted / sums.total
    nll = mean_of_passes(sums.mass * sums.total.log() - sums.cross)
    kl = mean_difference.sum(0) / max(1, len(mean_difference) - 1)
    # A class masked in one pass only is infinitely unlikely there; 0 * inf above hides it.
    kl = torch.where(kl.isnan() & ~nll.isnan(), torch.inf, kl)
    return nll, kl, sums._replace(total=sums.total.reciprocal(), weighted=mean_difference)


def write_columns(
    out: Tensor,
    columns: Columns,
    target: Target,
    statistics: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
    backward_passes: int,
) -> None:
    """Write the gradient of a block of classes, as `WriteColumns` describes it."""
    for start, stop in row_blocks(columns.products):
        rows = slice(start, stop)
        grad_nll, grad_kl = (None if grad is None else grad[rows] for grad in grads)
        grad = _gradient(
            columns.rows(start, stop),
            target.rows(start, stop),
            statistics[:, rows],
            grad_nll,
            grad_kl,
            backward_passes,
        )
        out[:backward_passes, rows].copy_(grad)
    out[backward_passes:].zero_()


def _gradient(
    columns: Columns,
    target: Target,
    statistics: Tensor,
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
) -> Tensor:
    """Return `p (mass a + b (1 - E + d)) - b mean(p) - a target` of the first passes."""
    num_passes = len(columns.products)
    maximum, inverse_sum, mean_difference, mass = (
        x[..., None] for x in _split(statistics, num_passes)
    )
    z = shape_logits(columns.products, columns.scale, columns.softcap)
    z = z.to(accumulation_dtype(columns.products.dtype))
    x = z - maximum
    p = x.exp().mul_(inverse_sum)
    first = p[:backward_passes]
    slope = mass.new_zeros(())
    if grad_nll is not None:
        slope = slope + mass * grad_nll[:, None]
    if grad_kl is not None:
        b = grad_kl[:, None]
        slope = slope + b * (1 - mean_difference[:backward_passes])
        grad = _difference(x)[:backward_passes].mul_(b).add_(slope).mul_(first)
        grad.sub_(p.mean(0).mul_(b))
    else:
        grad = first * slope
    if grad_nll is not None:
        if target.label_smoothing:
            grad.sub_(grad_nll[:, None] * _spread(columns, target, grad.dtype))
        # One class a row: gather and scatter are deterministic, scatter_add is not everywhere.
        index, on_class = _target_class(columns, target, grad.dtype)
        index = index.expand(len(grad), -1, 1)
        grad.scatter_(-1, index, grad.gather(-1, index) - (grad_nll * on_class)[:, None])
    if target.valid is not None:
        grad.masked_fill_(~target.valid[:, None], 0)
    factor = logits_slope(z[:backward_passes], columns.scale, columns.softcap)
    return grad if factor is None else grad.mul_(factor)


def _difference(x: Tensor) -> Tensor:
    """Return x_i - mean_j x_j of numbers of at most 0; 0 where a class is masked everywhere."""
    return (x - mean_of_passes(x)).nan_to_num_(0.0, torch.inf, -torch.inf)


def assert_classes(target: Target, num_classes: int) -> None:
    """Let a GPU stop at an index that names no class; it waits for nobody. A CPU has checked it."""
    if target.classes is not None and target.classes.is_cuda:
        inside = target.classes.clamp(0, num_classes - 1) == target.classes
        torch._assert_async(inside.all(), "target holds a class index out of range")


def class_rows(found: ClassRows | None) -> ClassRows:
    """Return a kernel's own form for blocks of classes, or else this one."""
    return ClassRows(collect_columns, write_columns) if found is None else found
