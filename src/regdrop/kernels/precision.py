"""In which precision terms are computed: float32 at least."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which terms of numbers of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the most digits that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def widen(numbers: Tensor) -> Tensor:
    """Return numbers in the dtype in which their terms are computed, without a copy if it is it."""
    return numbers.to(accumulation_dtype(numbers.dtype))
