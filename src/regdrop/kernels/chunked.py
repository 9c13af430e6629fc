"""The R-Drop terms in closed form, a block of rows at a time, in plain PyTorch.

The formulas are in `closed_form.py`. The forward keeps three numbers a row.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regdrop.kernels.closed_form import ClosedForm, accumulator
from regdrop.kernels.target import Target

# Temporary blocks together stay below a twentieth of the logits, but a block is never so small
# that starting the threads costs more than the arithmetic (nor so slow when cores are shared).
_LARGEST_SHARE = 64
_SMALLEST_BLOCK = 2**19
_SMALLEST_BLOCK_ON_DEVICES = 2**24


class RowStatistics(NamedTuple):
    """What the backward needs of each row, (num_passes, n) each."""

    maximum: Tensor
    inverse_sum: Tensor  # 1 / sum of exp(z - maximum)
    mean_difference: Tensor  # E_i


def chunked_kernel(compiled: bool = False) -> ClosedForm:
    """Return the kernel, the arithmetic of a block run through `torch.compile` if asked for."""
    return ClosedForm(
        partial(forward_blocks, compiled=compiled), partial(backward_blocks, compiled=compiled)
    )


def row_blocks(logits: Tensor, least_items: int = 1) -> list[tuple[int, int]]:
    """Return the first and the last item, exclusive, of every block, of `least_items` or more."""
    num_passes, num_items, num_classes = logits.shape
    if num_items == 0 or torch.compiler.is_compiling():
        return [(0, num_items)]
    # Blocks are computed in float32, so those of half-precision logits are twice as large.
    share = _LARGEST_SHARE * max(1, 4 // logits.element_size())
    smallest = _SMALLEST_BLOCK if logits.is_cpu else _SMALLEST_BLOCK_ON_DEVICES
    elements = max(smallest, logits.numel() // share)
    rows = max(least_items, elements // (num_passes * max(1, num_classes)))
    return [(start, min(start + rows, num_items)) for start in range(0, num_items, rows)]


def forward_blocks(
    logits: Tensor, target: Target, compiled: bool = False
) -> tuple[Tensor, Tensor, RowStatistics]:
    """Return each item's likelihood and divergence, and what their gradient needs of each row."""
    rows = _compiled(_forward_rows) if compiled else _forward_rows
    blocks = [
        rows(logits[:, start:stop], target.rows(start, stop)) for start, stop in row_blocks(logits)
    ]
    if len(blocks) == 1:
        nll, kl, *statistics = blocks[0]
    else:
        nll, kl, *statistics = (torch.cat(parts, -1) for parts in zip(*blocks, strict=True))
    return nll, kl, RowStatistics(*statistics)


def _forward_rows(logits: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_passes, num_items, num_classes = logits.shape
    dtype = accumulator(logits.dtype)
    if num_items == 0 or num_classes == 0:
        statistic = logits.new_zeros(num_passes, num_items, dtype=dtype)
        return statistic.sum(0), statistic.sum(0), statistic, statistic, statistic
    maximum = logits.amax(-1, keepdim=True).to(dtype)
    x = logits - maximum
    cross = _target_sum(x, target)  # sum of target * (z - maximum), mean over passes
    difference = _difference(x)
    e = x.exp_()
    total = e.sum(-1)
    mean_difference = e.mul_(difference).sum(-1) / total
    nll = _target_mass(target, num_classes, dtype) * total.log().mean(0) - cross
    kl = mean_difference.sum(0) / max(1, num_passes - 1)
    # A class masked in one pass only is infinitely unlikely there; 0 * inf above hides it.
    kl = torch.where(kl.isnan() & ~nll.isnan(), torch.inf, kl)
    if target.valid is not None:
        nll = torch.where(target.valid, nll, 0)
        kl = torch.where(target.valid, kl, 0)
    return nll, kl, maximum[..., 0], total.reciprocal(), mean_difference


def backward_blocks(
    out: Tensor,
    logits: Tensor,
    target: Target,
    statistics: tuple[Tensor, ...],
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
    compiled: bool = False,
) -> None:
    """Write the gradient of the logits, as `BackwardKernel` describes it."""
    write = _compiled(_write_backward_rows) if compiled else _write_backward_rows
    for start, stop in row_blocks(logits):
        rows = logits[:, start:stop]
        write(
            # One tensor where both are: compiled functions go wrong where two inputs share memory.
            rows if out is logits else out[:backward_passes, start:stop],
            rows,
            target.rows(start, stop),
            RowStatistics(*(x[:, start:stop] for x in statistics)),
            None if grad_nll is None else grad_nll[start:stop],
            None if grad_kl is None else grad_kl[start:stop],
            backward_passes,
        )
    out[backward_passes:].zero_()


def _write_backward_rows(
    out: Tensor,
    logits: Tensor,
    target: Target,
    statistics: RowStatistics,
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
) -> None:
    grad = _backward_rows(logits, target, statistics, grad_nll, grad_kl, backward_passes)
    # A part that is the whole would be compiled into a copy of the whole.
    (out if len(out) == backward_passes else out[:backward_passes]).copy_(grad)


def _backward_rows(
    logits: Tensor,
    target: Target,
    statistics: RowStatistics,
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
) -> Tensor:
    """Return `p (mass a + b (1 - E + d)) - b mean(p) - a target` of the first passes."""
    maximum, inverse_sum, mean_difference = (x[..., None] for x in statistics)
    x = logits - maximum
    if grad_kl is not None:
        b = grad_kl[:, None]
        difference = _difference(x)[:backward_passes]
        p = x.exp_().mul_(inverse_sum)
        mean_p = _mean_of_passes(p)
        p = p[:backward_passes]
        slope = b * (1 - mean_difference[:backward_passes])
        if grad_nll is not None:
            slope = slope + (_target_mass(target, logits.shape[-1], x.dtype) * grad_nll)[:, None]
        grad = difference.mul_(b).add_(slope).mul_(p).sub_(mean_p.mul_(b))
    else:
        assert grad_nll is not None
        slope = _target_mass(target, logits.shape[-1], x.dtype) * grad_nll
        grad = x[:backward_passes].exp_()
        grad.mul_(inverse_sum[:backward_passes] * slope[:, None])
    if grad_nll is not None:
        _subtract_target(grad, target, grad_nll)
    if target.valid is not None:
        grad.masked_fill_(~target.valid[None, :, None], 0)
    return grad


def _difference(x: Tensor) -> Tensor:
    """Return z_i - mean_j z_j up to row constants; 0 where a class is masked in every pass."""
    difference = x - _mean_of_passes(x)
    if torch.compiler.is_compiling():
        # The same as below, which would be compiled into a loop over single numbers.
        return torch.where(difference == difference, difference, 0)
    return difference.nan_to_num_(0.0, torch.inf, -torch.inf)


def _mean_of_passes(x: Tensor) -> Tensor:
    """Return the mean over passes of numbers of one sign, finite where all of them are."""
    # A mask is often the least finite number, whose sum would not be. A power of 2 rounds nothing.
    first, *others = x.unbind(0)
    scale = 0.5 ** len(others).bit_length()
    total = first * scale
    for row in others:
        total.add_(row, alpha=scale)
    whole = scale * len(x)
    return total if whole == 1 else total.div_(whole)


def _target_mass(target: Target, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return the sum of each item's target, (n,) or a scalar."""
    if target.probabilities is not None:
        return target.dense(dtype).sum(-1)
    assert target.classes is not None
    spread = target.spread_mass(num_classes, dtype)
    total = spread.sum() if isinstance(spread, Tensor) else spread * num_classes
    mass = target.class_mass(dtype) + total
    if isinstance(mass, Tensor):
        return mass
    return torch.full((), mass, dtype=dtype, device=target.classes.device)


def _target_sum(x: Tensor, target: Target) -> Tensor:
    """Return the sum over classes of target * x, mean over passes: (n,)."""
    if target.probabilities is not None:
        dense = target.dense(x.dtype)
        return torch.where(dense == 0, 0, dense * x).sum(-1).mean(0)
    assert target.classes is not None
    index = target.classes[None, :, None].expand(x.shape[0], -1, 1)
    result = x.gather(-1, index)[..., 0].mean(0) * target.class_mass(x.dtype)
    if target.label_smoothing:
        spread = target.spread_mass(x.shape[-1], x.dtype)
        weighted = x * spread if isinstance(spread, Tensor) else x
        total = weighted.sum(-1).mean(0)
        result = result + (total if isinstance(spread, Tensor) else total * spread)
    return result


def _subtract_target(grad: Tensor, target: Target, grad_nll: Tensor) -> None:
    """Subtract grad_nll * target from the gradient of every pass, in place."""
    if target.probabilities is not None:
        grad.sub_(target.dense(grad.dtype) * grad_nll[:, None])
        return
    assert target.classes is not None
    if target.label_smoothing:
        spread = target.spread_mass(grad.shape[-1], grad.dtype)
        grad.sub_(grad_nll[:, None] * spread)
    # One class a row: gather and scatter are deterministic, scatter_add is not everywhere.
    index = target.classes[None, :, None].expand(grad.shape[0], -1, 1)
    at_index = grad.gather(-1, index) - (grad_nll * target.class_mass(grad.dtype))[None, :, None]
    grad.scatter_(-1, index, at_index)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
