"""Class weights as a tensor, made once for a device: a GPU is waited for to copy them there."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from regdrop.tracing import is_traced, is_transformed


def class_weight_on(device: torch.device | None, weight: Sequence[float]) -> Tensor:
    """Return the weights of classes, (C,), on a device; not to be written to.

    Args:
        device: The device; None for torch's default.
        weight: One number a class.
    """
    # What is made inside of those would not work outside of them.
    if device is None or torch.compiler.is_compiling() or is_transformed() or is_traced():
        return torch.tensor(weight, device=device)
    return _make(device, tuple(weight), torch.get_default_dtype())


@lru_cache(maxsize=8)
def _make(device: torch.device, weight: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    # An evaluation may be the first to need it, and training the next.
    with torch.inference_mode(False):
        return torch.tensor(weight, dtype=dtype, device=device)
