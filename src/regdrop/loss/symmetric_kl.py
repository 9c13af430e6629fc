"""The divergence between passes by itself."""

import torch
from torch import Tensor

from regdrop.arguments import check_integer
from regdrop.kernels import Target, rdrop_terms, stack_rows, whole_tensor
from regdrop.loss.checks import (
    REDUCTIONS,
    check_choice,
    check_class_dim,
    check_finite_divergence,
    check_floating,
    check_mask,
    check_several_classes,
)
from regdrop.loss.output import Reduction


def symmetric_kl(
    logits: Tensor,
    *,
    num_passes: int = 2,
    mask: Tensor | None = None,
    class_dim: int = -1,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the symmetric KL divergence `1/2 [KL(P||Q) + KL(Q||P)]` between passes.

    It is that of a softmax. For labels of yes or no take `regdrop.loss.binary_cross_entropy_terms`,
    whose `kl` is that of each label by itself.

    Args:
        logits: (num_passes * batch, ..., C), floating point; pass 0 of the whole batch first. A
            DTensor may be spread over processes by classes; the mask is then the same in each.
        num_passes: Number of passes; more than two are averaged over all pairs.
        mask: Boolean, True where an item counts, broadcastable to (batch, ...).
        class_dim: Dimension of the classes in `logits`; 1 for torch's own layout, (batch, C, ...).
            From the logits alone a wrong one cannot be told.
        reduction: "mean" over unmasked items, "sum", or "none" (one number an item).

    Returns:
        A scalar, or (batch, ...) under "none"; float32 for half-precision logits.

    Raises:
        TypeError: For tensors of the wrong kind.
        ValueError: For shapes that do not fit, several items of one class each, or a class masked
            with -inf in one pass only.
    """
    check_integer("num_passes", num_passes, low=2)
    check_choice("reduction", reduction, REDUCTIONS)
    check_floating("logits", logits)
    check_class_dim("logits", logits, class_dim)
    if logits.shape[0] % num_passes:
        raise ValueError(
            f"logits must be (num_passes * batch, ..., classes) with num_passes={num_passes}, "
            f"got shape {tuple(logits.shape)}"
        )
    check_several_classes(logits, class_dim, num_passes)
    shape = [logits.shape[0] // num_passes, *logits.shape[1:]]
    del shape[class_dim]
    classes = torch.zeros(shape, dtype=torch.long, device=logits.device)
    if mask is not None:
        mask = check_mask(whole_tensor(mask), classes, "the items of one pass, of shape")
    valid = None if mask is None else mask.reshape(-1)
    _, kl = rdrop_terms(
        stack_rows(logits, num_passes, class_dim),
        Target(classes.view(-1), None, None, 0.0, valid),
        backward_passes=num_passes,
    )
    check_finite_divergence(kl)
    if reduction == "none":
        return kl.view(classes.shape)
    if reduction == "sum":
        return kl.sum()
    return kl.sum() / (max(1, kl.numel()) if valid is None else valid.sum().clamp(min=1))
