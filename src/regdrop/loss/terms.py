"""The two terms of every item, before they are reduced: what the output families compute."""

from typing import NamedTuple, Protocol

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


class TermsFunction(Protocol):
    """From stacked outputs and the target to the terms, the family's own options bound."""

    def __call__(
        self,
        outputs: Tensor,
        target: Tensor,
        /,
        *,
        num_passes: int,
        backward_passes: int | None = None,
    ) -> ItemTerms:
        """Return the terms of every item of the target."""
