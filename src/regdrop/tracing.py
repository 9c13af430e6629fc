"""Whether torch compiles or transforms what runs: then values cannot be read."""

from typing import Any

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Return whether `torch.func` transforms what runs: grad, vmap, jvp and their like.

    Functions with a gradient of their own have no rule there.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def can_read(device: torch.device) -> bool:
    """Return whether a check may read values: where nobody waits for a device, nor traces."""
    return device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()


def is_batched(tensor: Any) -> bool:
    """Return whether a tensor stands for a batch of them, as upstream gradients do that are.

    Those of `torch.autograd.grad(..., is_grads_batched=True)` are of another kind than those of
    `torch.func.vmap`.
    """
    functorch = torch._C._functorch
    return isinstance(tensor, Tensor) and (
        functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)
    )
