"""The R-Drop terms of two passes in closed form on a GPU without Triton.

torch compiles elementwise functions for a GPU by NVRTC, which comes with it: that needs neither
Triton nor a C compiler. Two of them do what else takes a dozen operations, so that logits are read
and written less often; sums over classes are torch's. `docs/performance-gpu.md` counts the copies,
the formulas are in `closed_form.py`.

Where d = ((x - max x) - (y - max y)) / 2 the constants of rows cost no digits. They are missing in
E too, so that they cancel in d - E.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from regdrop.kernels.chunked import backward_blocks, forward_blocks, sum_blocks
from regdrop.kernels.closed_form import ClosedForm, Weight
from regdrop.kernels.precision import accumulation_dtype, mean_of_passes
from regdrop.kernels.target import Target
from regdrop.tracing import is_traced

Function = Callable[..., Any]
# From a function's text and its number of outputs.
Compiler = Callable[[str, int], Function]
Blocks = Callable[[Tensor], Iterator[tuple[slice, list[Tensor]]]]

# Below as many logits the host rules, and the chunked form starts fewer operations: at 16 million
# this one took 1.8 times the official form's time on an H100 (docs/experiments-gpu.md).
LEAST_LOGITS = 2**25
# Blocks are a quarter of the logits, but none is smaller: of more blocks a GPU waits for its host.
_LARGEST_SHARE = 4
SMALLEST_BLOCK = 6 * 2**20

# Of a class: its exponentials, and each times the difference from the mean of both passes. A class
# that is masked with -inf in one pass only is infinitely unlikely there, and its product may be 0.
WEIGH = """
template <typename T>
void weigh(T x, T y, T highest_x, T highest_y, T& e_x, T& e_y, T& weighted_x, T& weighted_y) {
  const T lowest = static_cast<T>(-3.4e38);
  x -= highest_x;
  y -= highest_y;
  e_x = ::exp(x);
  e_y = ::exp(y);
  const T d = (x < lowest ? lowest : x) / 2 - (y < lowest ? lowest : y) / 2;
  weighted_x = e_x * d;
  weighted_y = -e_y * d;
  if (d > static_cast<T>(1e30) && weighted_x < d) weighted_x = d;
  if (d < static_cast<T>(-1e30) && weighted_y < -d) weighted_y = -d;
}
"""
# Of a class: its logits above the maximum of the row, the mean of both passes.
SHIFT = """
template <typename T>
void shift(T x, T y, T highest_x, T highest_y, T& mean) {
  const T lowest = static_cast<T>(-3.4e38);
  x -= highest_x;
  y -= highest_y;
  mean = (x < lowest ? lowest : x) / 2 + (y < lowest ? lowest : y) / 2;
}
"""
# Of a class: the gradients, but for the target's part. A row that does not count has no weights.
GRADE = """
template <typename T>
void grade(
    T x, T y, T highest_x, T highest_y, T slope_x, T slope_y, T kl_x, T kl_y, T& out_x, T& out_y) {
  const T lowest = static_cast<T>(-3.4e38);
  x -= highest_x;
  y -= highest_y;
  const T e_x = ::exp(x);
  const T e_y = ::exp(y);
  const T d = (x < lowest ? lowest : x) / 2 - (y < lowest ? lowest : y) / 2;
  out_x = e_x * slope_x + e_x * d * kl_x - e_y * kl_y / 2;
  out_y = e_y * slope_y - e_y * d * kl_y - e_x * kl_x / 2;
  if (slope_x == 0 && slope_y == 0 && kl_x == 0 && kl_y == 0) out_x = out_y = 0;
}
"""


def jitted_kernel(
    compiler: Compiler | None = None,
    least_logits: int = LEAST_LOGITS,
    smallest_block: int = SMALLEST_BLOCK,
) -> ClosedForm:
    """Return the kernel; what it has no functions for is left to the chunked form.

    Args:
        compiler: Makes functions of tensors on the device from their text; None for torch's.
        least_logits: Fewer logits are left to the chunked form.
        smallest_block: Logits of a block, of both passes, at least.
    """
    compiler = compiler or compile_elementwise
    blocks = partial(_blocks, smallest=smallest_block)
    return ClosedForm(
        partial(_forward, compiler=compiler, blocks=blocks, least_logits=least_logits),
        partial(_backward, compiler=compiler, blocks=blocks),
        sums=partial(_sums, least_logits=least_logits),
    )


@cache
def compile_elementwise(text: str, num_outputs: int) -> Function:
    """Return the elementwise function of a text, which torch compiles at its first call."""
    found: Function = torch.cuda.jiterator._create_multi_output_jit_fn(text, num_outputs)
    return found


def can_compile_elementwise(device: torch.device) -> bool:
    """Return whether torch compiles elementwise functions for a device; not where it traces."""
    if device.type != "cuda" or torch.compiler.is_compiling() or is_traced():
        return False
    return _has_compiled(device)


@cache
def _has_compiled(device: torch.device) -> bool:
    try:
        one = torch.zeros(1, device=device, dtype=torch.float32)
        compile_elementwise(WEIGH, 4)(one, one, one, one)
    except (AttributeError, AssertionError, RuntimeError):
        return False  # a build of torch without NVRTC
    return True


def _has_functions(logits: Tensor, target: Target, least_logits: int) -> bool:
    is_spread = target.label_smoothing > 0 and target.weight is not None
    return (
        logits.shape[0] == 2
        and logits.numel() >= max(1, least_logits)
        and target.classes is not None
        and not is_spread
    )


def _blocks(logits: Tensor, smallest: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Return blocks of items, and both passes of each, in the dtype of the arithmetic.

    The functions would convert half precision too, but several times as slowly.
    """
    num_items, num_classes = logits.shape[1:]
    dtype = accumulation_dtype(logits.dtype)
    elements = max(smallest, logits.numel() // _LARGEST_SHARE)
    size = max(1, elements // (2 * num_classes))
    for start in range(0, num_items, size):
        rows = slice(start, start + size)
        yield rows, [logits[i, rows].to(dtype) for i in range(2)]


def _forward(
    logits: Tensor, target: Target, *, compiler: Compiler, blocks: Blocks, least_logits: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return the terms, and of each row the maximum, 1 / sum of exponentials, and E."""
    if not _has_functions(logits, target, least_logits):
        return forward_blocks(logits, target)
    weigh = compiler(WEIGH, 4)
    highest = logits.amax(-1).to(accumulation_dtype(logits.dtype))
    columns = highest.unsqueeze(-1)
    # Of both passes each: the sum of exponentials, that of them times the difference.
    sums = highest.new_empty(5, logits.shape[1])
    for rows, passes in blocks(logits):
        arguments = (*passes, *columns[:, rows])
        for found, out in zip(weigh(*arguments), sums[:4, rows], strict=True):
            torch.sum(found, -1, out=out)
        if target.label_smoothing:
            torch.sum(compiler(SHIFT, 1)(*arguments), -1, out=sums[4, rows])
    totals, differences = sums[:2], sums[2:4] / sums[:2]
    nll = _nll(logits, target, highest, totals, sums[4])
    kl = differences.sum(0)
    if target.valid is not None:
        nll, kl = (torch.where(target.valid, x, 0) for x in (nll, kl))
    return nll, kl, (highest, totals.reciprocal_(), differences)


def _nll(
    logits: Tensor, target: Target, highest: Tensor, totals: Tensor, spread_sum: Tensor
) -> Tensor:
    """Return each item's NLL, the mean of both passes."""
    at_class = mean_of_passes(_at_class(logits, target)[1] - highest)
    class_mass = target.class_mass(totals.dtype)
    mass = class_mass + target.label_smoothing
    nll = totals.log().mean(0) * mass - at_class * class_mass
    if target.label_smoothing:
        nll = nll - spread_sum * (target.label_smoothing / logits.shape[-1])
    return nll


def _backward(
    out: Tensor,
    logits: Tensor,
    target: Target,
    statistics: tuple[Tensor, ...],
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
    *,
    compiler: Compiler,
    blocks: Blocks,
) -> None:
    if not statistics:
        return backward_blocks(out, logits, target, statistics, grad_nll, grad_kl, backward_passes)
    grade = compiler(GRADE, 2)
    highest, inverse, differences = statistics
    nll_slope, kl_slope = (inverse.new_zeros(()) if x is None else x for x in (grad_nll, grad_kl))
    class_mass = target.class_mass(inverse.dtype)
    mass = class_mass + target.label_smoothing
    slopes = inverse * (nll_slope * mass + kl_slope * (0.5 - differences))
    on_class = nll_slope * class_mass
    spread = (nll_slope * (target.label_smoothing / logits.shape[-1])).expand(len(logits[0]))
    factors = torch.cat([slopes, inverse * kl_slope])
    if target.valid is not None:
        factors, on_class, spread = (
            torch.where(target.valid, x, 0) for x in (factors, on_class, spread)
        )
    index, at_class = _at_class(logits, target)
    graded = grade(*at_class, *highest, *factors)
    columns = torch.cat([highest, factors]).unsqueeze(-1)
    for rows, passes in blocks(logits):
        grads = grade(*passes, *columns[:, rows])
        for grad, part in zip(grads[:backward_passes], out, strict=False):
            if target.label_smoothing:
                torch.sub(grad, spread[rows, None], out=part[rows])
            else:
                part[rows] = grad
    # The target's class again, before it is rounded.
    for i in range(backward_passes):
        found = (graded[i] - on_class - spread).to(out.dtype)
        out[i].scatter_(-1, index, found.unsqueeze(-1))
    if backward_passes < len(out):
        out[backward_passes:].zero_()


def _at_class(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Return the index of each item's class, (N, 1), and the logits there, (2, N)."""
    assert target.classes is not None
    index = target.classes.view(-1, 1)
    found = logits.gather(-1, index.expand(2, -1, -1)).squeeze(-1)
    return index, found.to(accumulation_dtype(logits.dtype))


def _sums(
    logits: Tensor,
    target: Target,
    nll_slope: Weight,
    kl_slope: Weight,
    backward_passes: int,
    inplace: bool,
    *,
    least_logits: int,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return nothing: a second look at the logits takes less than a gradient in float32."""
    if _has_functions(logits, target, least_logits):
        return None
    return sum_blocks(logits, target, nll_slope, kl_slope, backward_passes, inplace)
