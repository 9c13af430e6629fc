"""The R-Drop terms in closed form, in plain PyTorch: in few operations, a block of rows at a time.

The formulas are in `closed_form.py`. Small logits, and the blocks of large ones, cost what their
operations cost, so each of them does as much as torch has one operation for: `docs/performance.md`
counts how often they read and write all logits. The backward computes a block again, unless the
loss's weights were known in the forward, which then kept the gradient.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regdrop.kernels.closed_form import ClosedForm, Weight
from regdrop.kernels.precision import accumulation_dtype
from regdrop.kernels.target import Target
from regdrop.tracing import can_read

# Temporary blocks together stay below a twentieth of the logits, but a block is never so small
# that starting the threads costs more than the arithmetic (nor so slow when cores are shared).
_LARGEST_SHARE = 64
_SMALLEST_BLOCK = 2**19
# On other devices starting an operation costs more: of 32 blocks an H100 waited for its host, and
# temporary blocks of half of the logits are little beside the float32 gradient.
_LARGEST_SHARE_ON_DEVICES = 8
_SMALLEST_BLOCK_ON_DEVICES = 2**24
# Gradients of as many logits are kept though memory would be saved by computing them again.
_LARGEST_KEPT = 2**22
# Rows shorter than a vector register: torch's softmax on a CPU takes them number by number, unless
# the classes come first in memory.
_FEW_CLASSES = 16
# With fewer, that takes less time than the operations that bring them there.
_MANY_ROWS = 256
# Above this, a difference of log-probabilities is that of a mask, however it was written.
_LARGEST_DIFFERENCE = 1e30
# Below this no masked class takes part in an NLL.
_LARGEST_LIKELIHOOD = 1e9


class Comparison(NamedTuple):
    """What the passes of a block of n items give, in float32 at least.

    Attributes:
        nll: (n,), the NLL.
        kl: (n,), the divergence.
        p: (num_passes, n, C), probabilities.
        weighted: (num_passes, n, C), p_i d_i.
        mean_difference: (num_passes, n, 1), their sum over classes, E_i.
    """

    nll: Tensor
    kl: Tensor
    p: Tensor
    weighted: Tensor
    mean_difference: Tensor


def chunked_kernel(compiled: bool = False) -> ClosedForm:
    """Return the kernel, the arithmetic of a block run through `torch.compile` if asked for."""
    return ClosedForm(
        partial(forward_blocks, compiled=compiled),
        partial(backward_blocks, compiled=compiled),
        sums=partial(sum_blocks, compiled=compiled),
    )


def row_blocks(logits: Tensor, least_items: int = 1) -> list[tuple[int, int]]:
    """Return the first and the last item, exclusive, of every block, of `least_items` or more."""
    num_passes, num_items, num_classes = logits.shape
    if num_items == 0 or torch.compiler.is_compiling():
        return [(0, num_items)]
    share, smallest = _LARGEST_SHARE, _SMALLEST_BLOCK
    if not logits.is_cpu:
        share, smallest = _LARGEST_SHARE_ON_DEVICES, _SMALLEST_BLOCK_ON_DEVICES
    # Blocks are computed in float32, so those of half-precision logits are twice as large.
    share *= max(1, 4 // logits.element_size())
    elements = max(smallest, logits.numel() // share)
    rows = max(least_items, elements // (num_passes * max(1, num_classes)))
    return [(start, min(start + rows, num_items)) for start in range(0, num_items, rows)]


def forward_blocks(
    logits: Tensor, target: Target, compiled: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return each item's NLL and divergence; their gradient needs nothing of them."""
    rows = _compiled(_forward_rows) if compiled else _forward_rows
    blocks = [
        rows(logits[:, start:stop], target.rows(start, stop)) for start, stop in row_blocks(logits)
    ]
    if len(blocks) == 1:
        return *blocks[0], ()
    nll, kl = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return nll, kl, ()


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
    write = _compiled(_write_gradient) if compiled else _write_gradient
    for start, stop in row_blocks(logits):
        rows = logits[:, start:stop]
        write(
            # One tensor where both are: compiled functions go wrong where two inputs share memory.
            rows if out is logits else out[:backward_passes, start:stop],
            rows,
            target.rows(start, stop),
            None if grad_nll is None else grad_nll[start:stop],
            None if grad_kl is None else grad_kl[start:stop],
            backward_passes,
        )
    if backward_passes < len(out):
        out[backward_passes:].zero_()


def sum_blocks(
    logits: Tensor,
    target: Target,
    nll_slope: Weight,
    kl_slope: Weight,
    backward_passes: int,
    inplace: bool,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return both terms' sums and the gradient, as `SumKernel` describes it.

    None where the gradient would take memory that a second computation saves: beside logits that
    are overwritten, or in float32 beside half-precision logits on a CPU.
    """
    blocks = row_blocks(logits)
    dtype = accumulation_dtype(logits.dtype)
    is_costly = inplace or (logits.is_cpu and logits.dtype != dtype)
    if is_costly and logits.numel() > _LARGEST_KEPT and len(blocks) > 1:
        return None
    rows = _compiled(_sum_rows) if compiled else _sum_rows
    if len(blocks) == 1:
        return rows(logits, target, nll_slope, kl_slope, backward_passes)
    gradient = logits.new_empty(backward_passes, *logits.shape[1:], dtype=dtype)
    sums = []
    for start, stop in blocks:
        *both, gradient[:, start:stop] = rows(
            logits[:, start:stop],
            target.rows(start, stop),
            nll_slope,
            kl_slope,
            backward_passes,
        )
        sums.append(both)
    nll, kl = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    return nll, kl, gradient


def _forward_rows(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    found = _compare(logits, target)
    return found.nll, found.kl


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    target: Target,
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
) -> None:
    found = _compare(logits, target)
    # A part that is the whole would be compiled into a copy of the whole.
    out = out if len(out) == backward_passes else out[:backward_passes]
    _gradient(found, target, _column(grad_nll), _column(grad_kl), backward_passes, out)


def _sum_rows(
    logits: Tensor, target: Target, nll_slope: Weight, kl_slope: Weight, backward_passes: int
) -> tuple[Tensor, Tensor, Tensor]:
    found = _compare(logits, target)
    gradient = _gradient(
        found,
        target,
        _scalar(nll_slope, found.nll),
        _scalar(kl_slope, found.nll),
        backward_passes,
    )
    return found.nll.sum(), found.kl.sum(), gradient


def _compare(logits: Tensor, target: Target) -> Comparison:
    num_passes, num_items, num_classes = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    if num_items == 0 or num_classes == 0:
        nll = logits.new_zeros(num_items, dtype=dtype)
        empty = logits.new_zeros(logits.shape, dtype=dtype)
        return Comparison(nll, nll, empty, empty, nll.new_zeros(num_passes, num_items, 1))
    log_p = _log_softmax(logits, None if dtype == logits.dtype else dtype)
    # A class masked with -inf has a difference too: 0, where it is masked in every pass.
    log_p.clamp_(min=torch.finfo(dtype).min)
    mean = _mean_of_passes(log_p)
    nll = _infinite_where_masked(-_target_sum(mean, target), logits, target)
    p = log_p.exp()
    difference = log_p.sub_(mean)
    # One masked in one pass only is infinitely unlikely there, and its product may be 0.
    highest = difference.amax((0, 2))
    weighted = difference.mul_(p)
    mean_difference = weighted.sum(-1, keepdim=True)
    kl = mean_difference.sum((0, 2))
    if num_passes > 2:
        kl = kl / (num_passes - 1)
    # Not in place: the compiler of torch 2.11 gives such outputs a zero gradient.
    kl = kl + torch.threshold(highest, _LARGEST_DIFFERENCE, 0.0)
    if target.valid is not None:
        invalid = ~target.valid
        nll, kl = nll.masked_fill(invalid, 0), kl.masked_fill(invalid, 0)
    return Comparison(nll, kl, p, weighted, mean_difference)


def _log_softmax(logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the log-probabilities, (num_passes, n, C), of any strides."""
    num_passes, num_items, num_classes = logits.shape
    is_slow = num_classes <= _FEW_CLASSES and num_passes * num_items >= _MANY_ROWS
    if logits.is_cpu and is_slow and not torch.compiler.is_compiling():
        by_class = logits.transpose(1, 2).contiguous()
        return by_class.log_softmax(1, dtype=dtype).transpose(1, 2)
    return logits.log_softmax(-1, dtype=dtype)


def _gradient(
    found: Comparison,
    target: Target,
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return `p (mass a + b (1 - E + d)) - b mean(p) - a target` of the first passes.

    Args:
        found: The comparison.
        target: What the items are compared with.
        grad_nll: a, (n, 1) or a scalar; None for 0.
        grad_kl: b, likewise.
        backward_passes: Number of first passes.
        out: What to write to.
    """
    num_passes, _, num_classes = found.p.shape
    p, weighted, mean_difference = found[2:]
    if backward_passes < num_passes:
        p, weighted, mean_difference = (x[:backward_passes] for x in found[2:])
    if grad_nll is None:
        slope = torch.zeros((), dtype=p.dtype, device=p.device)
    else:
        slope = _times(grad_nll, _target_mass(target, num_classes, p.dtype))
    if grad_kl is None:
        common = torch.zeros_like(p[0])
    else:
        common = _mean_of_passes(found.p).mul_(-grad_kl)
        slope = torch.addcmul(slope + grad_kl, mean_difference, grad_kl, value=-1)
    if grad_nll is not None:
        _subtract_target(common, target, grad_nll)
    if grad_kl is None:
        gradient = torch.addcmul(common, p, slope, out=out)
    else:
        gradient = torch.addcmul(torch.addcmul(common, p, slope), weighted, grad_kl, out=out)
    if target.valid is not None:
        gradient.masked_fill_(~target.valid[:, None], 0)
    return gradient


def _column(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights[:, None]


def _scalar(weight: Weight, like: Tensor) -> Tensor | None:
    """Return a weight as a tensor, which enters an operation without being converted there."""
    if isinstance(weight, float):
        return torch.full((), weight, dtype=like.dtype, device=like.device)
    return None if weight is None else weight.to(like.device)


def _times(slope: Tensor, mass: Tensor | float) -> Tensor:
    return slope if isinstance(mass, float) and mass == 1 else slope * mass


def _mean_of_passes(x: Tensor) -> Tensor:
    """Return the mean over passes, (n, C), finite where all of them are."""
    # A mask is often the least finite number, whose sum would not be. A power of 2 rounds nothing.
    if len(x) == 2:
        return torch.lerp(x[0], x[1], 0.5)
    first, *others = x.unbind(0)
    scale = 0.5 ** len(others).bit_length()
    total = first * scale  # of one pass: a copy
    for row in others:
        total.add_(row, alpha=scale)
    whole = scale * len(x)
    return total if whole == 1 else total.div_(whole)


def _target_mass(target: Target, num_classes: int, dtype: torch.dtype) -> Tensor | float:
    """Return the sum of each item's target, (n, 1) or a number."""
    if target.probabilities is not None:
        return target.dense(dtype).sum(-1, keepdim=True)
    spread = target.spread_mass(num_classes, dtype)
    if isinstance(spread, Tensor):
        return _class_mass(target, dtype) + spread.sum()
    return 1.0


def _class_mass(target: Target, dtype: torch.dtype) -> Tensor | float:
    """Return the mass on the target class itself, (n, 1) or a number."""
    mass = target.class_mass(dtype)
    return mass[:, None] if isinstance(mass, Tensor) else mass


def _target_sum(x: Tensor, target: Target) -> Tensor:
    """Return the sum over classes of target * x, (n,)."""
    if target.probabilities is not None:
        dense = target.dense(x.dtype)
        return torch.where(dense == 0, 0, dense * x).sum(-1)
    assert target.classes is not None
    at_class = _times(x.gather(-1, target.classes.view(-1, 1)), _class_mass(target, x.dtype))
    if target.label_smoothing:
        spread = target.spread_mass(x.shape[-1], x.dtype)
        weighted = x * spread if isinstance(spread, Tensor) else x
        total = weighted.sum(-1, keepdim=True)
        at_class = at_class + (total if isinstance(spread, Tensor) else total * spread)
    return at_class.view(-1)


def _infinite_where_masked(nll: Tensor, logits: Tensor, target: Target) -> Tensor:
    """Return the NLL, (n,), infinite where the target has mass on a class masked with -inf.

    Among log-probabilities the least finite number stood for such a class.

    Args:
        nll: Computed from them.
        logits: (num_passes, n, C); the masks of all passes are the same.
        target: What the items are compared with.
    """
    if can_read(nll.device) and nll.max().item() < _LARGEST_LIKELIHOOD:
        return nll
    one_pass = logits[0]
    if target.probabilities is not None:
        is_hit = (one_pass.isneginf() & (target.dense(nll.dtype) != 0)).any(-1)
    else:
        assert target.classes is not None
        has_mass = target.class_mass(nll.dtype) != 0
        is_hit = one_pass.gather(-1, target.classes.view(-1, 1)).view(-1).isneginf() & has_mass
        if target.label_smoothing:
            spread = target.spread_mass(one_pass.shape[-1], nll.dtype)
            is_hit = is_hit | (one_pass.isneginf() & (spread != 0)).any(-1)
    # Added, since where all classes are masked there is no number.
    return nll + torch.zeros_like(nll).masked_fill(is_hit, torch.inf)


def _subtract_target(common: Tensor, target: Target, grad_nll: Tensor) -> None:
    """Subtract grad_nll * target from what the gradients of all passes have in common."""
    if target.probabilities is not None:
        common.sub_(target.dense(common.dtype) * grad_nll)
        return
    assert target.classes is not None
    if target.label_smoothing:
        common.sub_(grad_nll * target.spread_mass(common.shape[-1], common.dtype))
    # One class a row: gather and scatter are deterministic, scatter_add is not everywhere.
    index = target.classes.view(-1, 1)
    on_class = _times(grad_nll, _class_mass(target, common.dtype))
    common.scatter_(-1, index, common.gather(-1, index).sub_(on_class))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
