"""The R-Drop terms in closed form on a GPU: one kernel each way, written in Triton.

The forward takes the rows of one item, one of every pass, tile by tile of classes, and keeps
running maxima and sums relative to them, so that the logits are read once. The backward has one
program for each tile of an item; it reads the tile of every pass once and writes it once.
`docs/performance-gpu.md` counts the bytes. The formulas are in `closed_form.py`, the kernels in
`triton_programs.py`; here they are started.

The same kernels take a block of classes of a linear layer (`class_blocks.py`): the sums of the
blocks before are carried in memory, and the logits are made of the layer's products on the way.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from regdrop.kernels.class_columns import ClassRows, Columns, RowSums
from regdrop.kernels.class_rows import assert_classes
from regdrop.kernels.closed_form import ClosedForm
from regdrop.kernels.target import Target
from regdrop.kernels.triton_programs import backward_kernel, forward_kernel

# Numbers that a program reads at once, of all passes: an H100 was within 2 % of its best with them
# at every size.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 2048, 4096
_MOST_WARPS = 4
# Of a pass: those whose sums a thread of the forward keeps.
_LANE_BYTES = 16


def triton_kernel(device: torch.device) -> ClosedForm:
    """Return the kernel for logits on a device.

    Raises:
        ValueError: For another device than a GPU, unless Triton interprets its kernels.
    """
    if device.type != "cuda" and isinstance(forward_kernel, triton.JITFunction):
        raise ValueError(
            f"impl='triton' needs logits on a GPU (or TRITON_INTERPRET=1 before triton is "
            f"imported), got {device}; use 'auto' or 'chunked'"
        )
    return ClosedForm(
        _forward,
        _backward,
        least_items=1024,  # the forward has one program an item
        class_rows=ClassRows(collect_columns, write_columns),
    )


def _forward(logits: Tensor, target: Target) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    num_items, num_classes = logits.shape[1:]
    sums = RowSums.empty(logits, carried=False)
    if num_items == 0 or num_classes == 0:
        return sums.nll.zero_(), sums.kl.zero_(), (sums.statistics,)
    assert_classes(target, num_classes)
    collect_columns(Columns(logits, 0, num_classes), target, sums, True, True)
    return sums.nll, sums.kl, (sums.statistics,)


def _backward(
    out: Tensor,
    logits: Tensor,
    target: Target,
    statistics: tuple[Tensor, ...],
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
) -> None:
    columns = Columns(logits, 0, logits.shape[-1])
    write_columns(out, columns, target, statistics[0], (grad_nll, grad_kl), backward_passes)


def collect_columns(
    columns: Columns, target: Target, sums: RowSums, is_first: bool, is_last: bool
) -> None:
    """Add a block of classes to the sums of each row, as `CollectColumns` describes it."""
    logits = columns.products
    num_items, width = logits.shape[1:]
    options = _options(columns, target)
    tile = _tile(width, FORWARD_ELEMENTS, options)
    lane = min(tile, _LANE_BYTES // logits.element_size())
    with torch.cuda.device_of(logits):
        forward_kernel[(num_items,)](
            *(logits, *logits.stride()),
            *_target_arguments(target),
            sums.statistics,
            *(num_items, width, columns.first, columns.num_classes),
            FIRST=is_first,
            LAST=is_last,
            LANES=tile // lane,
            WIDE=lane,
            num_warps=_warps(tile),
            **options,
        )


def write_columns(
    out: Tensor,
    columns: Columns,
    target: Target,
    statistics: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
    backward_passes: int,
) -> None:
    """Write the gradient of a block of classes, as `WriteColumns` describes it."""
    logits = columns.products
    if logits.numel() == 0:
        return
    num_items, width = logits.shape[1:]
    options = _options(columns, target)
    tile = _tile(width, BACKWARD_ELEMENTS, options)
    tiles = -(-width // tile)
    with torch.cuda.device_of(logits):
        backward_kernel[(num_items * tiles,)](
            *(out, *out.stride()),
            *(logits, *logits.stride()),
            *_target_arguments(target),
            *(statistics, *grads),
            *(0 if grad is None else grad.stride(0) for grad in grads),  # 0 where all have one
            *(num_items, width, columns.first, columns.num_classes, tiles),
            BACKWARD_PASSES=backward_passes,
            TILE=tile,
            num_warps=_warps(tile),
            **options,
        )


def _tile(width: int, elements: int, options: dict[str, Any]) -> int:
    """Return the classes of a tile, a power of 2."""
    return int(min(_power_of_2(width), max(1, elements // options["ROWS"])))


def _power_of_2(least: int) -> int:
    # Triton's own takes microseconds, of which a small loss has few.
    return 1 << (least - 1).bit_length()


def _warps(tile: int) -> int:
    return max(1, min(_MOST_WARPS, tile // 256))


def _target_arguments(target: Target) -> tuple[Tensor | int | None, ...]:
    target = target.resolved()
    probabilities = target.probabilities
    strides = (0, 0) if probabilities is None else probabilities.stride()
    vectors = (target.classes, target.weight, target.valid)
    classes, weight, valid = (None if x is None else x.contiguous() for x in vectors)
    return (classes, probabilities, *strides, weight, valid)


def _options(columns: Columns, target: Target) -> dict[str, Any]:
    """Return what is compiled into both kernels."""
    num_passes = columns.products.shape[0]
    return {
        "LABEL_SMOOTHING": float(target.label_smoothing),
        "PASSES": num_passes,
        "ROWS": _power_of_2(num_passes),
        "SCALE": float(columns.scale),
        "SOFTCAP": columns.softcap,
        "enable_fp_fusion": True,
    }
