"""Whether an error is of too little memory, which says nothing of what was tried."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is of too little memory; that of a CPU has no class in torch."""
    has_class = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return has_class or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
