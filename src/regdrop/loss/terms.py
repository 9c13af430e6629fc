"""The two terms of every item, before they are reduced: what the output families compute."""

from typing import NamedTuple, Protocol

from torch import Tensor

from regdrop.loss.output import RDropOutput, Scale


class ItemTerms(NamedTuple):
    """Likelihood and divergence of every item, and the denominators of their means.

    Attributes:
        nll: NLL of one pass, mean over passes; 0 where an item does not count.
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


class LossFunction(Protocol):
    """From stacked outputs and the target to the loss, the family's own options bound.

    A family whose gradient is cheapest where the weights of both terms are known beforehand has
    one besides its terms.
    """

    def __call__(
        self,
        outputs: Tensor,
        target: Tensor,
        /,
        *,
        alpha: float,
        num_passes: int,
        backward_passes: int | None = None,
        items: Tensor | None = None,
        scale: Scale = "mean",
        num_items: Tensor | float | None = None,
        num_weight: Tensor | float | None = None,
    ) -> RDropOutput:
        """Return the mean over items.

        With `items`, (n,), all passes but the first hold those items alone: the NLL is that
        of pass 0, the divergence that of the part, weighted by its inverse share of the batch.
        """
