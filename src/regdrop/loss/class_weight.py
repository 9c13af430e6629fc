"""Class weights as a tensor, made once for a device: a GPU is waited for to copy them there."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from regdrop.kernels.precision import widest_dtype
from regdrop.tracing import is_traced, is_transformed


def class_weight_on(device: torch.device | None, weight: Sequence[float]) -> Tensor:
    """Return the weights of classes, (C,), on a device; not to be written to.

    They have all digits that the device can hold, whatever torch's default dtype is: a loss rounds
    them to the precision that it is computed in.

    Args:
        device: The device; None for torch's default.
        weight: One number a class.
    """
    # What is made inside of those would not work outside of them.
    if device is None or torch.compiler.is_compiling() or is_transformed() or is_traced():
        return _make(device, weight)
    return _keep(device, tuple(weight))


@lru_cache(maxsize=8)
def _keep(device: torch.device, weight: tuple[float, ...]) -> Tensor:
    # An evaluation may be the first to need it, and training the next.
    with torch.inference_mode(False):
        return _make(device, weight)


def _make(device: torch.device | None, weight: Sequence[float]) -> Tensor:
    dtype = widest_dtype(device or torch.get_default_device())
    return torch.tensor(weight, dtype=dtype, device=device)
