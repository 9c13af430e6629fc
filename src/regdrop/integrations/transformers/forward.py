"""One micro-batch through the model: what its loss reads, logits or the states before them."""

from typing import Any

import torch
from torch import Tensor, nn

from regdrop.config import RDropConfig
from regdrop.heads import Head
from regdrop.integrations.transformers.fused import FusedHead, fused_options
from regdrop.integrations.transformers.heads import base_model
from regdrop.kernels import Implementation, Projection, project
from regdrop.loss import (
    ItemTerms,
    LossFunction,
    RDropOutput,
    is_counted,
    linear_cross_entropy_loss,
    linear_cross_entropy_terms,
)
from regdrop.step import cut_outputs_of

# What multiplies the loss of a mixture of experts in the library's configs.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")

# Backward nodes that do not need what they returned, and views, which are asked further.
_NEED_NOTHING = frozenset(
    f"{name}Backward0"
    for name in ("Add", "Addmm", "Bmm", "Cat", "Clone", "Index", "Mm", "Mul", "Stack", "ToCopy")
)
_VIEWS = frozenset({"UnsafeViewBackward0", "ViewBackward0"})


class HeadForward:
    """A model and the head of one micro-batch as a function from inputs to what the loss reads.

    Args:
        model: The model, wrapped as it is trained.
        head: The head of the micro-batch.
        may_overwrite: Whether nobody but the loss reads the logits.
        fused: The last layer, where it is left to the loss; then the states before it take the
            place of the logits.
        impl: How a cross entropy is computed.

    Raises:
        ValueError: For an `impl` beside a head of another loss than a cross entropy.

    Attributes:
        last_output: The model's output of the last call.
        last_read: What the loss reads of it.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        *,
        may_overwrite: bool = False,
        fused: FusedHead | None = None,
        impl: Implementation = "auto",
    ) -> None:
        if impl != "auto" and not head.takes_kernel:
            raise ValueError(
                f"impl={impl!r} chooses how a cross entropy is computed, and the terms of this "
                "head are not those of cross_entropy_terms; use impl='auto'"
            )
        self.model, self.head, self.may_overwrite, self.fused = model, head, may_overwrite, fused
        self.impl = impl
        self.last_output: Any = None
        self.last_read: Tensor = head.target
        self._own_terms = cut_outputs_of(head.terms)
        self._projection: Projection | None = None
        self._auxiliary: list[Tensor] = []

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        """Run the model and return its logits, or the states before them."""
        if self.fused is None:
            self.last_output = self.model(**inputs)
            self.last_read = self.head.outputs(self.last_output)
        else:
            found = self.fused.run(self.model, inputs)
            self.last_output, self.last_read, projection = found
            self._projection = projection._replace(impl=self.impl)
        auxiliary = auxiliary_loss(self.model, self.last_output)
        if auxiliary is not None and torch.is_grad_enabled():
            self._auxiliary.append(auxiliary)
        return self.last_read

    def logits(self, read: Tensor) -> Tensor:
        """Return the logits of some rows of what was last read, without a gradient."""
        return read.detach() if self._projection is None else project(read, self._projection)

    @property
    def loss(self) -> LossFunction | None:
        """The loss of a fused head; None where terms are computed and combined."""
        return None if self.fused is None else self._fused_loss

    def _fused_loss(self, outputs: Tensor, target: Tensor, /, **options: Any) -> RDropOutput:
        return linear_cross_entropy_loss(outputs, target, **self._fused_options(), **options)

    def _fused_options(self) -> dict[str, Any]:
        return {"projection": self._projection, **fused_options(self.head)}

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
        if self.fused is not None:
            return linear_cross_entropy_terms(outputs, target, **self._fused_options(), **options)
        if self.head.takes_kernel:
            options["impl"] = self.impl
            may_overwrite = self.may_overwrite and self.impl != "eager"
            options["inplace"] = may_overwrite and is_free_to_overwrite(outputs)
        terms = self._own_terms(outputs, target, **options)
        if target is self.head.target and not is_counted(self.head.terms):
            require_counts(self.head, terms)
        return terms

    def auxiliary_loss(self, config: RDropConfig, num_items: Tensor | int | None) -> Tensor | float:
        """Return the auxiliary losses of the forwards with a gradient, on the loss's scale.

        Each micro-batch has the weight of its items in the window.
        """
        if not self._auxiliary:
            return 0.0
        mean = torch.stack(self._auxiliary).mean()
        factor = config.num_passes if config.scale == "sum" else 1
        share = 1 if num_items is None else self.head.counts().kl / num_items
        return mean * factor * share


def require_counts(head: Head, terms: ItemTerms) -> None:
    """Refuse a head that counts other items than its terms do.

    On a GPU it is an assertion on the device, for which nobody waits.

    Raises:
        ValueError: If they differ.
    """
    counts = head.counts()
    same = (counts.kl == terms.kl_count) & torch.isclose(
        counts.nll.to(terms.nll), terms.nll_count.to(terms.nll)
    )
    message = (
        "count of rdrop_head's Head must give what its terms count: the loss of a window would be "
        "divided by another number of items. Give Head(count=...) a function from the target to "
        "regdrop.loss.ItemCounts"
    )
    if same.device.type == "cuda":
        torch._assert_async(same, message)
    elif not bool(same):
        raise ValueError(
            f"{message}; it gave {counts.nll.item():g} and {counts.kl.item():g}, the terms "
            f"{terms.nll_count.item():g} and {terms.kl_count.item():g}"
        )


def auxiliary_loss(model: nn.Module, output: Any) -> Tensor | None:
    """Return the loss that a mixture of experts adds to the likelihood, with its coefficient."""
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


def is_free_to_overwrite(logits: Tensor) -> bool:
    """Return whether nothing in the backward needs the values of these logits.

    True behind a linear layer, a copy, a concatenation or a sum, as in nearly all heads; False
    where that cannot be told, as behind a tanh or in a compiled model.
    """
    node = logits.grad_fn
    while node is not None and type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and type(node).__name__ in _NEED_NOTHING
