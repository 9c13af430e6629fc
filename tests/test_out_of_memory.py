import pytest
import torch

from regdrop.out_of_memory import is_out_of_memory


def of_cpu():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**16)
    return raised.value


def test_errors_of_memory_are_told_from_others():
    assert all(map(is_out_of_memory, [of_cpu(), torch.OutOfMemoryError(), MemoryError()]))
    assert not is_out_of_memory(RuntimeError("shape '[4, 6]' is invalid"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
