"""Whether torch compiles, transforms or traces what runs: then values cannot be read."""

from typing import Any

import torch
from torch import Tensor

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_transformed() -> bool:
    """Return whether `torch.func` transforms what runs: grad, vmap, jvp and their like.

    Functions with a gradient of their own have no rule there.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Return whether tensors have shapes alone, by `FakeTensorMode`, or `make_fx` takes notes."""
    look = torch._C._get_dispatch_mode
    return look(_FAKE) is not None or look(_PROXY) is not None


def can_read(device: torch.device) -> bool:
    """Return whether a check may read values: where nobody waits for a device, nor traces."""
    return (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not is_traced()
    )


def is_batched(tensor: Any) -> bool:
    """Return whether a tensor stands for a batch of them, as upstream gradients do that are.

    Those of `torch.autograd.grad(..., is_grads_batched=True)` are of another kind than those of
    `torch.func.vmap`.
    """
    functorch = torch._C._functorch
    return isinstance(tensor, Tensor) and (
        functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)
    )
