"""The two terms of every item, before they are reduced: what the output families compute."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class ItemTerms(NamedTuple):
    """Likelihood and divergence of every item, and the denominators of their means.

    Attributes:
        nll: Likelihood of one pass, mean over passes; 0 where an item does not count.
        kl: Divergence, mean over pairs of passes, of the shape of `nll`.
        nll_count: Number (or class weight) of the items that count, a scalar.
        kl_count: Number of the items that count, a scalar.
    """

    nll: Tensor
    kl: Tensor
    nll_count: Tensor
    kl_count: Tensor


# (stacked outputs, target, num_passes, backward_passes) -> the terms of the target's items.
TermsFunction = Callable[[Tensor, Tensor, int, int | None], ItemTerms]
