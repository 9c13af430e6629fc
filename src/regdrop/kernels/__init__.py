"""How the R-Drop terms are computed: one function, several implementations of it."""

from typing import Literal, get_args

import torch
from torch import Tensor

from regdrop.kernels.chunked import chunked_terms
from regdrop.kernels.eager import eager_terms
from regdrop.kernels.fused_linear import Projection, linear_loss, linear_terms, project
from regdrop.kernels.target import Target

Implementation = Literal["auto", "eager", "chunked", "compiled", "cpp", "triton"]

# Named in the public API; their kernels are not part of this release.
_PLANNED = ("cpp", "triton")

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
        impl: "auto" takes the chunked closed form, or the eager form where the target itself
            requires a gradient; it never builds or compiles anything.

    Raises:
        ValueError: For an unknown or unavailable `impl`, or one that cannot do what is asked.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {get_args(Implementation)}, got {impl!r}")
    if impl in _PLANNED:
        raise ValueError(
            f"impl={impl!r} is not available in this release; "
            "use 'auto', 'eager', 'chunked' or 'compiled'"
        )
    needs_target_gradient = torch.is_grad_enabled() and any(
        isinstance(field, Tensor) and field.requires_grad for field in target
    )
    if impl == "auto":
        impl = "eager" if needs_target_gradient else "chunked"
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
    return chunked_terms(
        logits,
        target,
        backward_passes=backward_passes,
        inplace=inplace,
        compiled=impl == "compiled" and not torch.compiler.is_compiling(),
    )
