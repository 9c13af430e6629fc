"""From the two terms of every item to one loss: shared by all output families."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from regdrop.kernels import whole_tensor
from regdrop.loss.checks import check_counts, check_options
from regdrop.loss.output import RDropOutput, Reduction, Scale
from regdrop.loss.terms import ItemTerms


def combine_terms(
    terms: ItemTerms,
    *,
    alpha: float,
    num_passes: int,
    reduction: Reduction = "mean",
    scale: Scale = "mean",
    num_items: Tensor | float | None = None,
    num_weight: Tensor | float | None = None,
) -> RDropOutput:
    """Combine the terms of every item into the loss.

    Args:
        terms: NLL and divergence of the items, of any shape, and their counts.
        alpha: Weight of the divergence.
        num_passes: Number of passes.
        reduction: "mean", "sum" or "none".
        scale: "sum" for num_passes NLLs plus alpha times the divergence, "mean" for
            that over num_passes.
        num_items: Replaces both denominators under "mean".
        num_weight: Replaces the NLL's denominator under "mean"; defaults to num_items.

    Returns:
        The loss, and the two terms as detached means over valid items.

    Raises:
        TypeError, ValueError: For an option that is out of range, or terms of two shapes.
    """
    if not isinstance(terms, ItemTerms):
        raise TypeError(f"terms must be ItemTerms, got {type(terms).__name__}")
    if terms.nll.shape != terms.kl.shape:
        raise ValueError(
            "terms must have one NLL and one divergence an item, got nll of shape "
            f"{tuple(terms.nll.shape)} and kl of shape {tuple(terms.kl.shape)}; the NLL of stacked "
            "rows is .view(num_passes, -1).mean(0)"
        )
    for name, count in (("nll_count", terms.nll_count), ("kl_count", terms.kl_count)):
        if isinstance(count, Tensor) and count.numel() != 1:
            raise ValueError(
                f"terms must have {name} as a scalar, got a tensor of shape {tuple(count.shape)}"
            )
    check_options(alpha=alpha, num_passes=num_passes, reduction=reduction, scale=scale)
    check_counts(reduction, num_items=num_items, num_weight=num_weight)
    nll, kl = terms.nll, terms.kl
    total_nll, total_kl = nll.sum(), kl.sum()
    by = Denominators.find(terms.nll_count, terms.kl_count, num_items, num_weight, nll.dtype)
    by = Denominators(*(_as_tensor(number, nll) for number in by))
    mean_nll, mean_kl = total_nll.detach() / by.nll_count, total_kl.detach() / by.kl_count

    if reduction == "mean":
        nll, kl = total_nll / by.nll, total_kl / by.kl
    elif reduction == "sum":
        nll, kl = total_nll, total_kl
    nll_weight, kl_weight = term_weights(alpha, num_passes, scale)
    # Without alpha no gradient of the divergence is computed at all.
    loss = nll * nll_weight if alpha == 0 else nll * nll_weight + kl * kl_weight
    return RDropOutput(loss, mean_nll, mean_kl)


class Denominators(NamedTuple):
    """What the sums of both terms are divided by; one object where it is one number.

    Attributes:
        nll_count: Number (or class weight) of the items whose NLL counts, for the mean of it.
        kl_count: Number of the items whose divergence counts, likewise.
        nll: Of the NLL in the loss under "mean".
        kl: Of the divergence there.
    """

    nll_count: Tensor | float
    kl_count: Tensor | float
    nll: Tensor | float
    kl: Tensor | float

    @classmethod
    def find(
        cls,
        nll_count: Tensor | float,
        kl_count: Tensor | float,
        num_items: Tensor | float | None,
        num_weight: Tensor | float | None,
        dtype: torch.dtype,
    ) -> "Denominators":
        """Return them in the dtype of the sums; where nothing counts it is 1, for a sum of 0."""
        num_weight = num_items if num_weight is None else num_weight
        is_one_count = nll_count is kl_count
        nll_count = _nonzero(nll_count, dtype)
        kl_count = nll_count if is_one_count else _nonzero(kl_count, dtype)
        nll = nll_count if num_weight is None else _nonzero(num_weight, dtype)
        if num_items is None:
            return cls(nll_count, kl_count, nll, kl_count)
        kl = nll if num_items is num_weight else _nonzero(num_items, dtype)
        return cls(nll_count, kl_count, nll, kl)


class WeightedSum(Protocol):
    """Computes a weighted sum of both terms over items, as `kernels.rdrop_sum` does."""

    def __call__(
        self, *, nll_weight: Tensor | float | None, kl_weight: Tensor | float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum, and both terms' sums without weight and gradient."""


def reduce_sums(
    weighted_sum: WeightedSum,
    nll_count: Tensor | float,
    kl_count: Tensor | float,
    dtype: torch.dtype,
    *,
    alpha: float,
    num_passes: int,
    reduction: Reduction = "mean",
    scale: Scale = "mean",
    num_items: Tensor | float | None = None,
    num_weight: Tensor | float | None = None,
) -> RDropOutput:
    """Combine both terms into the loss where the kernel sums them: `combine_terms` without terms.

    Args:
        weighted_sum: Computes the sums once their weights are known.
        nll_count: Number (or class weight) of the items that count.
        kl_count: Number of the items that count.
        dtype: Of the sums.
        alpha: Weight of the divergence.
        num_passes: Number of passes.
        reduction: "mean" or "sum".
        scale: As in `combine_terms`.
        num_items: Replaces both denominators under "mean".
        num_weight: Replaces the NLL's denominator under "mean"; defaults to num_items.
    """
    nll_weight: Tensor | float
    nll_weight, kl_weight = term_weights(alpha, num_passes, scale)
    by = Denominators.find(nll_count, kl_count, num_items, num_weight, dtype)
    # One divisor is left for the end: half precision would not hold gradients that are divided.
    divisor = by.kl
    if reduction == "mean" and by.nll is not divisor:
        nll_weight = nll_weight * (divisor / by.nll)
    if reduction == "mean" and isinstance(nll_weight, float) and isinstance(divisor, float):
        # Dividing by one number more is cheaper than multiplying.
        kl_weight /= nll_weight
        divisor = divisor if nll_weight == 1 else divisor / nll_weight
        nll_weight = 1.0
    # Without alpha no gradient of the divergence is computed at all.
    total, nll, kl = weighted_sum(
        nll_weight=nll_weight, kl_weight=None if alpha == 0 else kl_weight
    )
    count = _as_tensor(by.nll_count, nll)
    mean_nll = nll / count
    mean_kl = kl / (count if by.kl_count is by.nll_count else _as_tensor(by.kl_count, kl))
    if reduction == "mean":
        total = total / (count if divisor is by.nll_count else _as_tensor(divisor, total))
    return RDropOutput(total, mean_nll, mean_kl)


def _nonzero(count: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """Return a count; where nothing counts it is 1, for a sum that is 0."""
    if not isinstance(count, Tensor):
        return float(count) or 1.0
    count = whole_tensor(count)  # counted from a target that is a DTensor
    count = count if count.dim() == 0 else count.reshape(())
    # Numbers of items need one operation, sums of weights two.
    if not count.is_floating_point():
        return count.clamp(min=1).to(dtype)
    return torch.where(count == 0, 1, count).to(dtype)


def _as_tensor(number: Tensor | float, like: Tensor) -> Tensor:
    """Return a number as a tensor, without a copy from one device to another that waits."""
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=like.dtype, device=like.device)


def term_weights(alpha: float, num_passes: int, scale: Scale) -> tuple[float, float]:
    """Return the weights of the NLL and of the divergence in the loss."""
    factor = float(num_passes if scale == "sum" else 1)
    return factor, float(alpha) * factor / num_passes
