"""The R-Drop terms in closed form on a CPU: vectorised C++, built on request.

`rows.cpp` has the kernel, `closed_form.py` the formulas. The build goes to torch's folder of
extensions (`TORCH_EXTENSIONS_DIR`) once for each kind of CPU and version of torch; a lock there
lets one process build while others wait.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regdrop.kernels.backward_passes import has_tangent
from regdrop.kernels.closed_form import ClosedForm
from regdrop.kernels.precision import accumulation_dtype
from regdrop.kernels.target import Target
from regdrop.tracing import is_traced, is_transformed

# The vector types of ATen are chosen by these, as torch's own build does for each kind of CPU;
# of AVX512_BF16 torch has none, it is the kernel's own.
_AVX2 = ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"]
_AVX512 = [
    *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-mavx2", "-mfma", "-mf16c"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
]
_FLAGS = {
    "DEFAULT": ["-DCPU_CAPABILITY=DEFAULT"],
    "AVX2": _AVX2,
    "AVX512": _AVX512,
    "AVX512_BF16": [*_AVX512, "-mavx512bf16"],
}


def cpp_kernel(device: torch.device) -> ClosedForm:
    """Return the kernel for logits on a device, built before it is returned.

    Raises:
        ValueError: For another device than a CPU, or where there is no compiler.
        RuntimeError: Where the compiler fails.
    """
    if device.type != "cpu":
        raise ValueError(f"impl='cpp' needs logits on a CPU, got {device}; use 'auto' or 'chunked'")
    _library()
    # A thread takes whole items.
    return ClosedForm(_forward, _backward, least_items=4 * torch.get_num_threads())


def whole_loss(
    logits: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    nll_weight: float,
    kl_weight: float | None,
    is_mean: bool,
    num_passes: int,
    backward_passes: int,
    inplace: bool,
    largest_divergence: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the loss of class indices and the means of both terms, in one operation.

    Around small logits its call is most of the time, so that the operation itself looks whether
    shapes and types are those that it takes.

    Args:
        logits: (num_passes * batch, ..., C), contiguous, on a CPU.
        classes: (batch, ...), int64, contiguous.
        weight: (C,) or None.
        ignore_index: Index of the items that do not count.
        label_smoothing: As in `Target`.
        nll_weight: Weight of the NLL in the loss.
        kl_weight: Weight of the divergence; None for no gradient of it.
        is_mean: Whether the loss is a mean of the items that count, or a sum.
        num_passes: Number of passes.
        backward_passes: The first passes that carry the gradient.
        inplace: Overwrite `logits` with the gradient in the backward.
        largest_divergence: Mean divergence above which None is returned.

    Returns:
        None for tensors that are not as above, or of another type, and inside of `torch.compile`
        and `torch.func`.

    Raises:
        ValueError: For an index that is neither a class nor ignored.
    """
    if (
        type(logits) is not Tensor
        or type(classes) is not Tensor
        or not logits.is_cpu
        or torch.compiler.is_compiling()
        or is_transformed()
        or is_traced()
    ):
        return None
    if weight is not None:
        if weight.requires_grad or has_tangent(weight) or type(weight.detach()) is not Tensor:
            return None
        weight = weight.detach().resolve_neg().to(accumulation_dtype(logits.dtype)).contiguous()
    found = _library().rows_loss.default(
        logits,
        classes,
        weight,
        ignore_index,
        float(label_smoothing),
        nll_weight,
        kl_weight,
        is_mean,
        num_passes,
        backward_passes,
        inplace,
        largest_divergence,
    )
    return tuple(found) if found else None


def _forward(logits: Tensor, target: Target) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    arguments = _target_arguments(target, accumulation_dtype(logits.dtype))
    memory = _library().rows_forward(_with_rows(logits), *arguments)
    return memory[0], memory[1], (memory,)


def _backward(
    out: Tensor,
    logits: Tensor,
    target: Target,
    statistics: tuple[Tensor, ...],
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    backward_passes: int,
) -> None:
    rows = _with_rows(out)
    _library().rows_backward(
        rows,
        _with_rows(logits),
        *_target_arguments(target, accumulation_dtype(logits.dtype)),
        *statistics,
        None if grad_nll is None else grad_nll.contiguous(),
        None if grad_kl is None else grad_kl.contiguous(),
        backward_passes,
    )
    if rows is not out:
        out.copy_(rows)


def _with_rows(logits: Tensor) -> Tensor:
    """Return the tensor, or a copy of it, with the classes of an item next to each other."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _target_arguments(target: Target, dtype: torch.dtype) -> tuple[Tensor | float | None, ...]:
    classes, probabilities, weight, label_smoothing, valid = target.resolved()
    return (
        None if classes is None else classes.contiguous(),
        None if probabilities is None else probabilities.to(dtype).contiguous(),
        None if weight is None else weight.to(dtype).contiguous(),
        None if valid is None else valid.contiguous(),
        float(label_smoothing),
    )


def missing_tools() -> list[str]:
    """Return what the build needs and this machine lacks, in words."""
    from torch.utils.cpp_extension import is_ninja_available

    compiler = os.environ.get("CXX", "c++").strip()
    missing = []
    if not shutil.which(compiler.partition(" ")[0]):
        # Torch takes an empty one as it is.
        named = f"{compiler}, or $CXX" if compiler else "$CXX, which is empty"
        missing.append(f"C++ compiler ({named})")
    if not is_ninja_available():
        missing.append("ninja (pip install ninja)")
    return missing


@cache
def _library() -> Any:
    """Build the kernel, or find it built, and return its operators."""
    from torch.utils.cpp_extension import get_default_build_root, load

    if missing := missing_tools():
        raise ValueError(
            f"impl='cpp' builds a kernel and finds no {' and no '.join(missing)}; "
            f"install it or use impl='auto' or 'chunked'"
        )
    kind = _kind_of_cpu()
    name = f"regdrop_rows_{kind.lower()}"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    folder = root / f"{name}_torch_{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    with build_alone(folder):
        load(
            name=name,
            sources=[str(Path(__file__).with_name("rows.cpp"))],
            extra_cflags=["-O3", "-fopenmp", *_FLAGS[kind]],
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )
    return torch.ops.regdrop


@contextmanager
def build_alone(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder, and the next one after a build was killed.

    Torch's own lock is a file, `lock`, that a killed build leaves behind and others wait for
    without end. The system's lock ends with the process that holds it: who has it knows that
    nobody builds, and removes that file.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where torch's lock is the only one
        yield
        return
    with (folder / "building").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def _kind_of_cpu() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    # torch tells a CPU's features from 2.11 on; before, ATen rounds to bfloat16.
    features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capability == "AVX512" and features.get("avx512_bf16"):
        return "AVX512_BF16"
    return capability if capability in _FLAGS else "DEFAULT"
