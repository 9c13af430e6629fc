"""One micro-batch through the model: its logits, and what else of its output the loss needs."""

from typing import Any

import torch
from torch import Tensor, nn

from regdrop.config import RDropConfig
from regdrop.integrations.transformers.heads import Head, base_model
from regdrop.loss import ItemTerms

# Backward nodes that do not need what they returned, and views, which are asked further.
_NEED_NOTHING = frozenset(
    f"{name}Backward0"
    for name in ("Add", "Addmm", "Bmm", "Cat", "Clone", "Index", "Mm", "Mul", "Stack", "ToCopy")
)
_VIEWS = frozenset({"UnsafeViewBackward0", "ViewBackward0"})


class HeadForward:
    """A model and the head of one micro-batch as a function from inputs to logits.

    Args:
        model: The model, wrapped as it is trained.
        head: The head of the micro-batch.
        may_overwrite: Whether nobody but the loss reads the logits.

    Attributes:
        last_output: The model's output of the last call.
        last_logits: Its logits.
    """

    def __init__(self, model: nn.Module, head: Head, *, may_overwrite: bool) -> None:
        self.model, self.head, self.may_overwrite = model, head, may_overwrite
        self.last_output: Any = None
        self.last_logits: Tensor = head.target
        self._auxiliary: list[Tensor] = []

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        """Run the model and return the logits."""
        self.last_output = self.model(**inputs)
        self.last_logits = self.head.outputs(self.last_output)
        auxiliary = auxiliary_loss(self.model, self.last_output)
        if auxiliary is not None and torch.is_grad_enabled():
            self._auxiliary.append(auxiliary)
        return self.last_logits

    def terms(
        self,
        outputs: Tensor,
        target: Tensor,
        /,
        *,
        num_passes: int,
        backward_passes: int | None = None,
    ) -> ItemTerms:
        """Return the head's terms; the gradient overwrites the logits where nothing needs them."""
        options: dict[str, Any] = {"num_passes": num_passes, "backward_passes": backward_passes}
        if self.may_overwrite and self.head.takes_inplace and is_free_to_overwrite(outputs):
            options["inplace"] = True
        return self.head.terms(outputs, target, **options)

    def auxiliary_loss(self, config: RDropConfig, num_items: Tensor | int | None) -> Tensor | float:
        """Return the auxiliary losses of the forwards with a gradient, on the loss's scale.

        Each micro-batch has the weight of its items in the window.
        """
        if not self._auxiliary:
            return 0.0
        mean = torch.stack(self._auxiliary).mean()
        factor = config.num_passes if config.scale == "sum" else 1
        share = 1 if num_items is None else self.head.num_items() / num_items
        return mean * factor * share


def auxiliary_loss(model: nn.Module, output: Any) -> Tensor | None:
    """Return the loss that a mixture of experts adds to the likelihood, with its coefficient."""
    loss: Tensor | None = getattr(output, "aux_loss", None)
    if loss is None:
        return None
    config: Any = base_model(getattr(model, "module", model)).config
    coefficient: float | None = getattr(config.get_text_config(), "router_aux_loss_coef", None)
    if coefficient is None:
        raise ValueError(
            f"{type(config).__name__} has no router_aux_loss_coef for the auxiliary loss that the "
            "model returns; set it, or switch the auxiliary loss off"
        )
    return loss * coefficient


def is_free_to_overwrite(logits: Tensor) -> bool:
    """Return whether nothing in the backward needs the values of these logits.

    True behind a linear layer, a copy, a concatenation or a sum, as in nearly all heads; False
    where that cannot be told, as behind a tanh or in a compiled model.
    """
    node = logits.grad_fn
    while node is not None and type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and type(node).__name__ in _NEED_NOTHING
