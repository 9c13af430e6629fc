"""The model's or the trainer's own loss as the NLL, beside the divergence of the logits.

Whatever the loss is, it is computed by whoever computes it without R-Drop, for every pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regdrop.heads import Head
from regdrop.integrations.transformers.likelihood.divergence import Divergence
from regdrop.loss import ItemTerms, TermsFunction
from regdrop.passes import find_batch_size
from regdrop.reading import Reading
from regdrop.step_terms import cut_outputs_of

# From a batch with its labels, and the number of items of the window or None, to loss and output.
ComputeLoss = Callable[[dict[str, Any], Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class OwnLoss:
    """What the first batch told of a loss that somebody else computes.

    Attributes:
        counts_items: Whether it is divided by the number of items that it is given; else it is a
            mean over its own batch.
        is_rowwise: Whether its value for a stacked batch is the mean of those of the passes. Where
            it is not, as with negatives or pairs in the batch, passes run one by one.
        divergence: How the logits are compared; None where the head is known.
        note: What else to say of it; None for nothing.
    """

    counts_items: bool
    is_rowwise: bool
    divergence: Divergence | None
    note: str | None = None


def read_own_loss(
    compute: ComputeLoss, head: Head, num_items: Tensor | float | None, inputs: dict[str, Any]
) -> Reading:
    """Compute the own loss of some passes, and read the logits beside it.

    Args:
        compute: The loss of a batch with its labels.
        head: Reads the logits.
        num_items: Items of the accumulation window as the loss counts them; None if it does not.
        inputs: The batch, of one pass or several.

    Raises:
        ValueError: If the logits have no gradient where the loss is trained.
    """
    if num_items is not None:
        num_items = num_items * (find_batch_size(inputs) / head.rows)
    loss, output = compute(inputs, num_items)
    logits = head.outputs(output)
    if not torch.is_grad_enabled():
        return Reading(logits, output)
    if not logits.requires_grad:
        raise ValueError(
            "the logits to be compared must carry a gradient, and those beside this loss "
            "have none, so that their divergence would train nothing: return scores, not labels "
            "that were decoded of them (TRL's trainers compute losses without logits: use "
            "regdrop.integrations.trl.RDropSFTTrainer; there is no form for preferences against a "
            "reference model, as DPO's)"
        )
    return Reading(logits, output, (loss,))


def divergence_terms(head: Head) -> TermsFunction:
    """Return terms that hold the divergence of each item alone; their NLL is 0."""
    own_terms = cut_outputs_of(head.terms)

    def terms(
        outputs: Tensor,
        target: Tensor,
        /,
        *,
        num_passes: int,
        backward_passes: int | None = None,
    ) -> ItemTerms:
        if num_passes == 1:
            zero, one = outputs.new_zeros(()), outputs.new_ones(())
            return ItemTerms(zero, zero, one, head.counts().kl)
        own = own_terms(outputs, target, num_passes=num_passes, backward_passes=backward_passes)
        return own._replace(nll=torch.zeros_like(own.kl), nll_count=own.kl_count)

    return terms
