"""A loss that somebody else computes, tried on batches: its value, and its slope at the logits."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from regdrop.extra_pass import extra_pass
from regdrop.integrations.transformers.likelihood.own_loss import ComputeLoss
from regdrop.integrations.transformers.outputs import Key, find_tensor
from regdrop.out_of_memory import is_out_of_memory
from regdrop.passes import (
    copy_structure,
    find_tensors,
    preserve_buffers,
    preserve_random_state,
)

# A number of items that no batch has.
SOME_ITEMS = 37.0
# What autograd calls the making of the same numbers in the same order.
_COPIES = {
    f"{name}Backward"
    for name in (
        "Alias",
        "Clone",
        "ReshapeAlias",
        "Squeeze",
        "ToCopy",
        "UnsafeView",
        "Unsqueeze",
        "View",
    )
}


class LossProbe:
    """A loss, its model in the mode and with the parameters that it has while it is tried.

    Args:
        model: The unwrapped model.
        compute: The loss.
        counts_items: Whether it divides by the number of items that it is given.
        asks_slope: Whether its slope may be asked.
    """

    def __init__(
        self, model: nn.Module, compute: ComputeLoss, counts_items: bool, asks_slope: bool = True
    ) -> None:
        self.model = model
        self.compute = compute
        self.counts_items = counts_items
        self.asks_slope = asks_slope

    def look(self, batch: Mapping[str, Any], num_passes: int = 1) -> tuple[Tensor, Any]:
        """Return the loss of a batch and the output, of several passes that are stacked."""
        items = self.items(batch, num_passes)
        return extra_pass(self.model, lambda own: self.compute(own, items), dict(batch))

    def slope(self, batch: Mapping[str, Any], key: Key, num_passes: int = 1) -> Tensor | None:
        """Return the derivative with respect to the logits, 0 where the loss does not read them.

        None where nobody knows: they have no gradient, it is 0 or no number here, or a part of the
        model knows a whole backward alone.

        Args:
            batch: A batch with its labels.
            key: Where the logits are in the output.
            num_passes: Passes that are stacked in it.
        """
        if not self.asks_slope:
            return None
        items = self.items(batch, num_passes)
        with preserve_random_state(), preserve_buffers(self.model), torch.enable_grad():
            loss, output = self.compute(copy_structure(dict(batch), clones=True), items)
            logits = find_tensor(output, key)
            if not (loss.requires_grad and logits.requires_grad):
                return None
            try:
                return _slope_at(loss, logits)
            except RuntimeError as error:  # as that of a reentrant checkpoint
                if is_out_of_memory(error):
                    raise
                return None

    def items(self, batch: Mapping[str, Any], num_passes: int = 1) -> Tensor | None:
        """Return the number of items that the loss is given; None where it counts none."""
        if not self.counts_items:
            return None
        device = next(find_tensors(batch)).device
        return torch.tensor(num_passes * SOME_ITEMS, device=device)


def _slope_at(loss: Tensor, logits: Tensor) -> Tensor | None:
    places: list[Tensor | GradientEdge] = [logits, *_same_numbers(logits)]
    for place in places:
        (slope,) = torch.autograd.grad(loss, place, allow_unused=True, retain_graph=True)
        if slope is not None:
            # A loss whose margins are all met tells nothing, nor does one that is no number.
            tells = bool(slope.any()) and bool(slope.isfinite().all())
            return slope.reshape(logits.shape) if tells else None
    return torch.zeros_like(logits)


def _same_numbers(logits: Tensor) -> Iterator[GradientEdge]:
    """Yield what logits were copied or reshaped from, which a loss may have read in their place.

    Under autocast what a model returns is a copy in single precision.
    """
    node = logits.grad_fn
    while node is not None and node.name().rstrip("0123456789") in _COPIES:
        node, index = node.next_functions[0]
        if node is not None:
            yield GradientEdge(node, index)
