"""The R-Drop terms of logits whose classes are spread over processes, as by tensor parallelism.

Every process collects the sums of its own classes. They are gathered, a dozen numbers a row, and
combined alike everywhere; a process then writes the gradient of its own classes. Logits never
leave a process. `class_rows.py` has the arithmetic.
"""

import math
import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regdrop.kernels.class_columns import ClassRows, Columns, RowSums
from regdrop.kernels.class_rows import assert_classes, class_rows, combine_shares
from regdrop.kernels.closed_form import ClosedForm
from regdrop.kernels.target import Target

_DIFFERENT = (
    "the processes that share the classes of logits must have the same target, and shares as "
    "torch.chunk makes them"
)


def is_distributed(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor of torch: spread over processes, or a copy in each."""
    if type(tensor) is Tensor:  # nearly always
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole_tensor(tensor: Any) -> Tensor:
    """Return all of a DTensor as a plain tensor, and any other as it is."""
    whole: Tensor = tensor.full_tensor() if is_distributed(tensor) else tensor
    return whole


def stack_rows(logits: Tensor, num_passes: int, class_dim: int) -> Tensor:
    """Return logits (num_passes * batch, ..., C), the classes in any dimension, as rows.

    Returns:
        (num_passes, N, C), a view wherever that is possible. Of a DTensor whose classes are spread
        it is one too; one that every process has a copy of becomes a plain tensor.

    Raises:
        ValueError: If a DTensor is spread in any other way.
    """
    if not is_distributed(logits):
        return _as_rows(logits, num_passes, class_dim)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    distributed: Any = logits
    class_dim %= logits.dim()
    mesh, places = distributed.device_mesh, distributed.placements
    spread = [i for i in range(mesh.ndim) if mesh.size(i) > 1 and not places[i].is_replicate()]
    local = distributed.to_local()
    if not spread:
        return _as_rows(local, num_passes, class_dim)
    place = places[spread[0]]
    if len(spread) > 1 or type(place) is not Shard or place.dim != class_dim:
        raise ValueError(
            "logits that are a DTensor must be a copy in every process, or spread by classes over "
            f"one dimension of the mesh, Shard({class_dim}), got {places}; use logits.redistribute"
        )
    num_classes = logits.shape[class_dim]
    num_items = logits.numel() // max(1, num_classes * num_passes)
    return DTensor.from_local(
        local.movedim(class_dim, -1).reshape(num_passes, num_items, local.shape[class_dim]),
        mesh,
        [Shard(2) if i == spread[0] else Replicate() for i in range(mesh.ndim)],
        run_check=False,
        shape=torch.Size((num_passes, num_items, num_classes)),
        stride=(num_items * num_classes, num_classes, 1),
    )


def _as_rows(logits: Tensor, num_passes: int, class_dim: int) -> Tensor:
    if class_dim not in (-1, logits.dim() - 1):
        logits = logits.movedim(class_dim, -1)
    *items, num_classes = logits.shape
    shape = num_passes, math.prod(items) // num_passes, num_classes
    # Seldom a copy, and the one operation less where it is none.
    return (logits.view if logits.is_contiguous() else logits.reshape)(shape)


def enter_share(logits: Any, kernel: ClosedForm) -> tuple[Tensor, ClosedForm]:
    """Return a process's own share of the classes, and the kernel of the terms of all classes.

    Args:
        logits: (num_passes, N, C), a DTensor whose classes are spread, as `stack_rows` returns it.
        kernel: What goes through the share.
    """
    (mesh_dim,) = (i for i, place in enumerate(logits.placements) if not place.is_replicate())
    mesh, num_classes = logits.device_mesh, logits.shape[-1]
    # As torch.chunk does it: all but the last ones have as many, and the very last may have none.
    width = -(-num_classes // mesh.size(mesh_dim))
    first = min(num_classes, width * mesh.get_local_rank(mesh_dim))
    share = _Share(mesh.get_group(mesh_dim), first, min(width, num_classes - first), num_classes)
    rows = class_rows(kernel.class_rows)
    local = logits.to_local().contiguous()
    return local, ClosedForm(
        partial(_forward, share=share, rows=rows), partial(_backward, share=share, rows=rows)
    )


class _Share(NamedTuple):
    """Which classes a process has: `width` of them, from `first` on."""

    group: Any
    first: int
    width: int
    num_classes: int

    def columns(self, logits: Tensor) -> Columns:
        return Columns(logits, self.first, self.num_classes)


def _forward(
    logits: Tensor, target: Target, *, share: _Share, rows: ClassRows
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    if target.classes is None:
        raise ValueError(
            "target must hold class indices where the classes of logits are spread over "
            "processes, got class probabilities"
        )
    sums = RowSums.empty(logits)
    fits = logits.shape[-1] == share.width
    if fits and logits.numel():
        rows.collect(share.columns(logits), target, sums, True, False)
    else:  # no class is here, or no item anywhere
        sums.statistics.zero_()
        sums.statistics[: len(logits)].fill_(-torch.inf)
    valid = target.valid
    labels = target.classes if valid is None else torch.where(valid, target.classes, -1)
    labels = labels if fits else torch.full_like(labels, torch.nan, dtype=torch.float32)
    memory = torch.cat([sums.statistics, labels.to(sums.statistics.dtype)[None]])
    shares = _gather(memory, share.group)
    if not fits:  # after the others have had what they wait for
        raise ValueError(
            f"logits must be spread over processes as torch.chunk does it, {share.width} of "
            f"{share.num_classes} classes here, got {logits.shape[-1]}"
        )
    _check_labels(torch.stack([part[-1] for part in shares]))
    combine_shares([part[:-1] for part in shares], target, sums)
    assert_classes(target, share.num_classes)
    return sums.nll, sums.kl, (sums.statistics,)


def _backward(
    out: Tensor,
    logits: Tensor,
    target: Target,
    statistics: tuple[Tensor, ...],
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
    *,
    share: _Share,
    rows: ClassRows,
) -> None:
    if logits.numel():
        grads = grad_nll, grad_kl
        rows.write(out, share.columns(logits), target, statistics[0], grads, backward_passes)


def _gather(memory: Tensor, group: Any) -> list[Tensor]:
    """Return what every process of a group has, in the order of their ranks."""
    import torch.distributed

    shares = [torch.empty_like(memory) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shares, memory, group=group)
    return shares


def _check_labels(labels: Tensor) -> None:
    """Raise where the target, (processes, N), is not the same everywhere; a GPU stops by itself."""
    are_same = (labels == labels[0]).all()
    if labels.is_cpu:
        if not are_same:
            raise ValueError(_DIFFERENT)
    elif labels.is_cuda:
        torch._assert_async(are_same, _DIFFERENT)
