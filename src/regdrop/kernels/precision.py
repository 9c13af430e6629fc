"""In which precision terms are computed: float32 at least."""

import torch
from torch import Tensor

# Others may not have double precision at all, as Apple's.
_WITH_DOUBLE = ("cpu", "cuda", "meta")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which terms of numbers of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the most digits that a device has."""
    if device.type == "xpu":
        has_double = torch.xpu.get_device_properties(device).has_fp64
    else:
        has_double = device.type in _WITH_DOUBLE
    return torch.float64 if has_double else torch.float32


def mean_of_passes(numbers: Tensor) -> Tensor:
    """Return the mean over the first dimension, finite where all of them are.

    A mask is often the least finite number, whose sum would not be.
    """
    # A power of 2 rounds nothing.
    scale = 0.5 ** (len(numbers) - 1).bit_length()
    return (numbers * scale).sum(0).div_(scale * len(numbers))


def widen(numbers: Tensor) -> Tensor:
    """Return numbers in the dtype in which their terms are computed, without a copy if it is it."""
    return numbers.to(accumulation_dtype(numbers.dtype))
