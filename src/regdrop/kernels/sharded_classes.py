"""The R-Drop terms of logits whose classes are spread over processes, as by tensor parallelism.

Every process collects the sums of its own classes. They are gathered, a dozen numbers a row, and
combined alike everywhere; a process then writes the gradient of its own classes. Logits never
leave a process. `class_rows.py` has the arithmetic.
"""

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from regdrop.kernels.backward_passes import differentiable_once
from regdrop.kernels.class_rows import (
    ClassRows,
    Columns,
    RowSums,
    assert_classes,
    class_rows,
    combine_shares,
)
from regdrop.kernels.closed_form import ClosedForm, scale_gradients
from regdrop.kernels.target import Target


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
    from torch.distributed.tensor import DTensor, Shard

    distributed: Any = logits
    class_dim %= logits.dim()
    spread = [place for place in distributed.placements if not place.is_replicate()]
    local = distributed.to_local()
    if not spread:
        return _as_rows(local, num_passes, class_dim)
    if len(spread) > 1 or type(spread[0]) is not Shard or spread[0].dim != class_dim:
        raise ValueError(
            "logits that are a DTensor must be a copy in every process, or spread by classes over "
            f"one dimension of the mesh, Shard({class_dim}), got {distributed.placements}; "
            "use logits.redistribute"
        )
    num_classes = logits.shape[class_dim]
    num_items = logits.numel() // max(1, num_classes * num_passes)
    rows = local.movedim(class_dim, -1).reshape(num_passes, num_items, local.shape[class_dim])
    return DTensor.from_local(
        rows,
        distributed.device_mesh,
        [Shard(2) if place is spread[0] else place for place in distributed.placements],
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


def sharded_terms(
    logits: Any, target: Target, kernel: ClosedForm, *, backward_passes: int, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Return each item's NLL and divergence, plain tensors and the same in every process.

    Args:
        logits: (num_passes, N, C), a DTensor whose classes are spread.
        target: Class indices of the N items, the same in every process; gets no gradient.
        kernel: What goes through a process's own classes.
        backward_passes: The first passes that carry the gradient, times num_passes / this.
        inplace: Overwrite a process's logits with their gradient in the backward.

    Raises:
        ValueError: For class probabilities.
    """
    if target.classes is None:
        raise ValueError(
            "target must hold class indices where the classes of logits are spread over "
            "processes, got class probabilities"
        )
    local = logits.to_local().contiguous()
    share = _find_share(logits)
    rows = class_rows(kernel.class_rows)
    nll, kl = _ShardedTerms.apply(local, target, share, rows, backward_passes, inplace)
    return nll, kl


class _Share(NamedTuple):
    """Which classes a process has: as many as its logits, from `first` on."""

    group: Any
    first: int
    num_classes: int


def _find_share(logits: Any) -> _Share:
    (mesh_dim,) = (
        i for i, placement in enumerate(logits.placements) if not placement.is_replicate()
    )
    mesh, num_classes = logits.device_mesh, logits.shape[-1]
    # As torch.chunk does it: all but the last ones have as many, and the very last may have none.
    width = -(-num_classes // mesh.size(mesh_dim))
    first = min(num_classes, width * mesh.get_local_rank(mesh_dim))
    return _Share(mesh.get_group(mesh_dim), first, num_classes)


class _ShardedTerms(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Target,
        share: _Share,
        rows: ClassRows,
        backward_passes: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        sums = RowSums.empty(logits)
        num_passes = len(logits)
        columns = Columns(logits, share.first, share.num_classes)
        if logits.numel():
            rows.collect(columns, target, sums, True, False)
        else:  # no class is here, or no item anywhere
            sums.statistics.zero_()
            sums.statistics[:num_passes].fill_(-torch.inf)
        combine_shares(_gather(sums.statistics, share.group), target, sums)
        assert_classes(target, share.num_classes)
        ctx.save_for_backward(logits, sums.statistics)
        ctx.options = target, share, rows, backward_passes, inplace
        ctx.set_materialize_grads(False)
        return sums.nll, sums.kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_nll: Tensor | None, grad_kl: Tensor | None) -> Any:
        logits, statistics = ctx.saved_tensors
        target, share, rows, backward_passes, inplace = ctx.options
        grads = scale_gradients(grad_nll, grad_kl, len(logits), backward_passes)
        if all(grad is None for grad in grads):
            return (None,) * 6
        logits = logits.detach()
        out = logits if inplace else torch.empty_like(logits)
        if logits.numel():
            columns = Columns(logits, share.first, share.num_classes)
            rows.write(out, columns, target, statistics, grads, backward_passes)
        if inplace:
            # Autograd then refuses a layer's backward that needs the logits.
            torch.autograd.graph.increment_version(out)
        return out, None, None, None, None, None


def _gather(memory: Tensor, group: Any) -> list[Tensor]:
    """Return what every process of a group has, in the order of their ranks."""
    import torch.distributed

    shares = [torch.empty_like(memory) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shares, memory, group=group)
    return shares
