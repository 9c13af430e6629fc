"""The R-Drop terms by the kernel of a name, or by the definition where that is needed."""

import torch
from torch import Tensor

from regdrop.kernels.backward_passes import has_tangent
from regdrop.kernels.closed_form import (
    ClosedForm,
    Weight,
    closed_form_sum,
    closed_form_terms,
    mix,
)
from regdrop.kernels.eager import eager_terms
from regdrop.kernels.implementation import Implementation, check_implementation
from regdrop.kernels.selection import select_kernel
from regdrop.kernels.sharded_classes import enter_share, is_distributed
from regdrop.kernels.target import Target
from regdrop.tracing import is_transformed


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
        logits: (num_passes, N, C), the classes' scores of every pass; also a DTensor whose classes
            are spread over processes.
        target: What the N items are compared with.
        backward_passes: The first passes that carry the gradient, times num_passes / this.
        inplace: Let the gradient overwrite `logits` in the backward.
        impl: "auto" takes the eager form where the target itself requires a gradient, in
            forward-mode differentiation and in `torch.func`, else what `select_kernel` takes.

    Raises:
        ValueError: For an unknown or unavailable `impl`, or one that cannot do what is asked.
    """
    kernel = _choose(logits, target, inplace, impl)
    if kernel is None:
        return eager_terms(logits, target, backward_passes=backward_passes)
    if is_distributed(logits):
        logits, kernel = enter_share(logits, kernel)
    return closed_form_terms(
        logits, target, kernel, backward_passes=backward_passes, inplace=inplace
    )


def rdrop_sum(
    logits: Tensor,
    target: Target,
    *,
    nll_weight: Weight,
    kl_weight: Weight,
    backward_passes: int,
    inplace: bool = False,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weighted sum of both terms over the items, and both sums without a gradient.

    Args:
        logits: As in `rdrop_terms`.
        target: As in `rdrop_terms`.
        nll_weight: Weight of the NLL, a number; None leaves it out.
        kl_weight: Weight of the divergence, likewise.
        backward_passes: As in `rdrop_terms`.
        inplace: As in `rdrop_terms`.
        impl: As in `rdrop_terms`.

    Raises:
        ValueError: As `rdrop_terms`.
    """
    kernel = _choose(logits, target, inplace, impl)
    if kernel is None:
        nll, kl = eager_terms(logits, target, backward_passes=backward_passes)
        nll, kl = nll.sum(), kl.sum()
        return mix(nll, kl, nll_weight, kl_weight), nll.detach(), kl.detach()
    if is_distributed(logits):
        logits, kernel = enter_share(logits, kernel)
    return closed_form_sum(
        logits,
        target,
        kernel,
        nll_weight=nll_weight,
        kl_weight=kl_weight,
        backward_passes=backward_passes,
        inplace=inplace,
    )


def _choose(
    logits: Tensor, target: Target, inplace: bool, impl: Implementation
) -> ClosedForm | None:
    """Return the kernel of the closed form; None for the eager form."""
    check_implementation(impl)
    given = [field for field in target if isinstance(field, Tensor)]
    needs_target_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    is_forward_mode = has_tangent(logits, *given)
    needs_definition = needs_target_gradient or is_forward_mode or is_transformed()
    if impl == "eager" or (impl == "auto" and needs_definition):
        if inplace:
            raise ValueError(
                "inplace=True needs a closed-form kernel, got impl='eager' (or a target that "
                "requires a gradient, forward-mode differentiation, or torch.func)"
            )
        if is_distributed(logits):
            got = "a target or weight that requires a gradient" if needs_target_gradient else impl
            raise ValueError(
                "logits whose classes are spread over processes need impl='auto', 'chunked' or "
                f"'triton', and give first derivatives of logits alone, got {got}"
            )
        return None
    if needs_target_gradient:
        raise ValueError(
            f"impl={impl!r} gives no gradient to target or weight; detach them or use impl='eager'"
        )
    if is_forward_mode:
        raise ValueError(
            f"impl={impl!r} has no forward-mode derivative; use impl='auto' or 'eager'"
        )
    if is_transformed():
        raise ValueError(
            f"impl={impl!r} has no rule for torch.func (grad, vmap); use impl='auto' or 'eager'"
        )
    return select_kernel(impl, logits.device, logits.dtype)
