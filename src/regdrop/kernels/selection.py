"""Which kernel computes the closed form: by name, or the best that a device has."""

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch

from regdrop.kernels.chunked import chunked_kernel
from regdrop.kernels.closed_form import ClosedForm
from regdrop.kernels.implementation import Implementation, check_implementation
from regdrop.kernels.jitted_rows import can_compile_elementwise, jitted_kernel
from regdrop.tracing import is_traced


def select_kernel(
    impl: Implementation, device: torch.device, dtype: torch.dtype = torch.float32
) -> ClosedForm:
    """Return the kernel of a name for logits of a dtype on a device.

    "auto" takes the Triton kernel on a GPU where it can run, else the chunked form, which on a GPU
    has functions that torch compiles by NVRTC. It needs no C++ build and no torch.compile; a GPU's
    kernels are compiled at first use. Inside torch.compile, and where `make_fx` or `FakeTensorMode`
    trace, every kernel is the chunked form: the compiler fuses it.

    Raises:
        ValueError: For "eager", which is no closed form, an unknown name, or a kernel that is not
            available there.
    """
    check_implementation(impl)
    if impl == "eager":
        raise ValueError("impl='eager' keeps full logits; use 'auto' or another kernel")
    if torch.compiler.is_compiling() or is_traced():
        return chunked_kernel()
    if impl == "auto":
        can_run = device.type == "cuda" and _can_run_triton(device, dtype)
        impl = "triton" if can_run else "chunked"
    if impl == "cpp":
        from regdrop.kernels.cpp_rows import cpp_kernel

        return cpp_kernel(device)
    if impl == "triton":
        if find_spec("triton") is None:
            raise ValueError(
                "impl='triton' needs the package triton, which is not installed; "
                "use 'auto' or 'chunked'"
            )
        from regdrop.kernels.triton_rows import triton_kernel

        return triton_kernel(device)
    if impl == "chunked" and can_compile_elementwise(device):
        return jitted_kernel()
    return chunked_kernel(compiled=impl == "compiled")


@cache
def _can_run_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the Triton kernel can run for logits of a dtype on a GPU."""
    return obstacle_to_triton(device, dtype) is None


def obstacle_to_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the Triton kernel cannot run for logits of a dtype on a device; None if it can."""
    if device.type != "cuda":
        return "Triton runs on a GPU alone"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton needs a C compiler (cc, gcc, clang or $CC), and there is none"
    # Turing GPUs, 7.5, have no bfloat16.
    least = (8, 0) if dtype == torch.bfloat16 else (7, 5)
    found = torch.cuda.get_device_capability(device)
    if found < least:
        wanted, has = (".".join(map(str, pair)) for pair in (least, found))
        return f"it needs compute capability {wanted}, and this GPU has {has}"
    return None
