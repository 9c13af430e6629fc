"""One micro-batch through a model of transformers: what its loss reads."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.config import RDropConfig
from regdrop.heads import Head
from regdrop.integrations.transformers.forward.last_layer import FusedHead, fused_options
from regdrop.integrations.transformers.heads.registry import base_model
from regdrop.kernels import Projection
from regdrop.loss import (
    LossFunction,
    TermsFunction,
    linear_cross_entropy_loss,
    linear_cross_entropy_terms,
)
from regdrop.reading import Reading

# What multiplies the loss of a mixture of experts in the library's configs.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def read_logits_of(
    model: nn.Module, head: Head, has_experts: bool, inputs: dict[str, Any]
) -> Reading:
    """Run a model, wrapped as it is trained, and read the logits.

    Args:
        model: The model.
        head: Reads the logits.
        has_experts: Whether an auxiliary loss that it returns is a part of its own.
        inputs: The batch, of one pass or several.
    """
    output = model(**inputs)
    losses = _expert_losses(model, output) if has_experts else ()
    return Reading(head.outputs(output), output, losses)


def read_states_of(model: nn.Module, fused: FusedHead, inputs: dict[str, Any]) -> Reading:
    """Run a model, wrapped as it is trained, and read what its last layer would."""
    output, states, projection = fused.run(model, inputs)
    return Reading(states, output, _expert_losses(model, output), projection)


def fused_terms(head: Head, projection: Projection) -> tuple[TermsFunction, LossFunction]:
    """Return the terms and the loss of states before the last layer."""
    options = {"projection": projection, **fused_options(head)}
    return (
        partial(linear_cross_entropy_terms, **options),
        partial(linear_cross_entropy_loss, **options),
    )


@dataclass(frozen=True)
class Window:
    """What the loss of a micro-batch is divided by: the accumulation window in which it stands.

    Attributes:
        num_items: Items of the window as R-Drop's terms count them, of all processes; None for the
            mean of the micro-batch alone.
        own_items: Its items as a loss of somebody's own counts them; None if it does not.
        num_batches: By which a mean of the micro-batch alone is divided.
        num_shares: Processes over which gradients are averaged that were counted together.
    """

    num_items: Tensor | int | None
    own_items: Tensor | int | None
    num_batches: int
    num_shares: int

    def scale(self, loss: Tensor) -> Tensor:
        """Return the micro-batch's part of the loss, from its sum over `num_items` or its mean."""
        return loss / self.num_batches if self.num_items is None else loss * self.num_shares


def weigh_expert_loss(
    reading: Reading, head: Head, config: RDropConfig, window: Window
) -> Tensor | float:
    """Return the mean auxiliary loss of the forwards with a gradient, on the loss's scale.

    Each micro-batch has the weight of its items in the window. In a window without any item all
    count alike: experts are balanced for words without labels too.

    Args:
        reading: What was read of the forwards.
        head: The head of the micro-batch.
        config: The options.
        window: The window.
    """
    if not reading.losses:
        return 0.0
    mean = torch.stack(reading.losses).mean()
    factor = config.num_passes if config.scale == "sum" else 1
    if window.num_items is None:
        return mean * factor
    items = torch.as_tensor(window.num_items, device=mean.device)
    alike = 1 / (window.num_batches * window.num_shares)
    share = torch.where(items > 0, head.counts().kl / items.clamp(min=1), alike)
    return mean * factor * share


def auxiliary_loss(model: nn.Module, output: Any) -> Tensor | None:
    """Return the loss that a mixture of experts adds to the NLL, with its coefficient."""
    loss: Tensor | None = getattr(output, "aux_loss", None)
    if loss is None:
        return None
    config: Any = base_model(getattr(model, "module", model)).config
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in _COEFFICIENTS]
    found.append(getattr(getattr(text, "ffn_config", None), "moe_loss_weight", None))
    coefficient = next((value for value in found if value is not None), None)
    if coefficient is None:
        raise ValueError(
            f"{type(config).__name__} has no router_aux_loss_coef for the auxiliary loss that the "
            "model returns; set it, or switch the auxiliary loss off"
        )
    return loss * float(coefficient)


def _expert_losses(model: nn.Module, output: Any) -> tuple[Tensor, ...]:
    loss = auxiliary_loss(model, output)
    return () if loss is None or not torch.is_grad_enabled() else (loss,)
