"""How the R-Drop terms are computed: one function, several implementations of it."""

import os
import shutil
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from regdrop.kernels.chunked import chunked_terms
from regdrop.kernels.eager import eager_terms
from regdrop.kernels.fused_linear import linear_loss, linear_terms
from regdrop.kernels.linear_chunks import Projection, project
from regdrop.kernels.target import Target

Implementation = Literal["auto", "eager", "chunked", "compiled", "cpp", "triton"]

__all__ = [
    "Implementation",
    "Projection",
    "Target",
    "linear_loss",
    "linear_terms",
    "project",
    "rdrop_terms",
]


def rdrop_terms(
    logits: Tensor,
    target: Target,
    *,
    backward_passes: int,
    inplace: bool = False,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Return each item's negative log-likelihood and symmetric KL, both (N,).

    Args:
        logits: (num_passes, N, C), the classes' scores of every pass.
        target: What the N items are compared with.
        backward_passes: The first passes that carry the gradient, times num_passes / this.
        inplace: Let the gradient overwrite `logits` in the backward.
        impl: "auto" takes the eager form where the target itself requires a gradient, else the
            Triton kernel on a GPU where it can run, else the chunked closed form. It never builds
            anything and never calls torch.compile. Inside torch.compile every closed form is the
            chunked one, which the compiler fuses.

    Raises:
        ValueError: For an unknown or unavailable `impl`, or one that cannot do what is asked.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {get_args(Implementation)}, got {impl!r}")
    needs_target_gradient = torch.is_grad_enabled() and any(
        isinstance(field, Tensor) and field.requires_grad for field in target
    )
    if impl == "auto":
        if needs_target_gradient:
            impl = "eager"
        else:
            impl = "triton" if logits.is_cuda and _can_run_triton(logits.device) else "chunked"
    if impl == "eager":
        if inplace:
            raise ValueError(
                "inplace=True needs a closed-form kernel, got impl='eager' "
                "(or a target that requires a gradient)"
            )
        return eager_terms(logits, target, backward_passes=backward_passes)
    if needs_target_gradient:
        raise ValueError(
            f"impl={impl!r} gives no gradient to target or weight; detach them or use impl='eager'"
        )
    if impl == "cpp" and not torch.compiler.is_compiling():
        from regdrop.kernels.cpp_rows import cpp_terms

        return cpp_terms(logits, target, backward_passes=backward_passes, inplace=inplace)
    if impl == "triton" and not torch.compiler.is_compiling():
        if find_spec("triton") is None:
            raise ValueError(
                "impl='triton' needs the package triton, which is not installed; "
                "use 'auto' or 'chunked'"
            )
        from regdrop.kernels.triton_rows import triton_terms

        return triton_terms(logits, target, backward_passes=backward_passes, inplace=inplace)
    return chunked_terms(
        logits,
        target,
        backward_passes=backward_passes,
        inplace=inplace,
        compiled=impl == "compiled" and not torch.compiler.is_compiling(),
    )


@cache
def _can_run_triton(device: torch.device) -> bool:
    """Return whether Triton is installed, finds the C compiler it needs, and knows this GPU."""
    compiler = os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))
    return (
        find_spec("triton") is not None
        and bool(compiler)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
