"""The states that a language model's last layer reads, instead of the logits that it would return.

The model runs as ever, through whatever wraps it, so that processes exchange their gradients as
ever. Two hooks for the length of a call show the last layer one position alone, and put all that it
would have read where the model's output has hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.integrations.transformers.heads.registry import Head, base_model
from regdrop.kernels import Projection
from regdrop.kernels.projection import casts_itself
from regdrop.loss import cross_entropy_terms

# What multiplies and what divides logits in the library's models, and what bounds them.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FIELDS = ("decoder_hidden_states", "hidden_states")


@dataclass(frozen=True)
class FusedHead:
    """A language model whose last layer is left to the loss.

    Attributes:
        model: The unwrapped model.
        layer: Its last layer.
        projection: The layer and what follows it, as the loss computes it.
    """

    model: nn.Module
    layer: nn.Linear
    projection: Projection

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Tensor, Projection]:
        """Run the model, wrapped as it is trained.

        Returns:
            Its output, with the logits of the first position alone; the states that the last layer
            reads, (batch, length, features); and the projection in the dtype of that moment.
        """
        with _exposed_input(self.model, self.layer) as dtypes:
            output = model(**inputs)
        hidden: Tensor = getattr(output, _field(output))[0]
        return output, hidden, self.projection._replace(dtype=dtypes[0])


def find_fused_head(model: nn.Module) -> FusedHead:
    """Read the last layer of an unwrapped Hugging Face model, and what its config puts behind it.

    Raises:
        ValueError: If the last layer is no plain linear layer, or has hooks.
    """
    base: Any = base_model(model)
    find_layer = getattr(base, "get_output_embeddings", None)
    layer = find_layer() if callable(find_layer) else None
    # A subclass (an adapter, a quantised layer) and a replaced forward do more than multiply.
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        raise ValueError(f"its last layer must be a plain torch.nn.Linear, got {layer}")
    computed = [x for x in ("weight", "bias") if getattr(layer, x) is not layer._parameters.get(x)]
    if computed:
        raise ValueError(
            f"the {computed[0]} of its last layer must be a parameter, got one that each forward "
            "computes (as prune and weight_norm have it)"
        )
    kinds = {type(x) for x in (layer.weight, layer.bias) if x is not None} - {nn.Parameter}
    if kinds:
        raise ValueError(
            f"the parameters of its last layer must be plain tensors, got {kinds.pop().__name__} "
            "(as quantisation has it)"
        )
    # What goes before the layer is seen whole: the states are taken behind it.
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise ValueError(
            "its last layer must have no forward and no backward hooks, which would see the first "
            "position alone"
        )
    holders = (base, base.config.get_text_config(decoder=True), base.config)
    scale = 1.0
    for name in _FACTORS:
        scale *= _number(holders, name) or 1.0
    for name in _DIVISORS:
        scale /= _number(holders, name) or 1.0
    softcap = next((cap for name in _SOFTCAPS if (cap := _number(holders, name))), None)
    bias: Tensor | None = layer.bias
    further = getattr(base, "final_logits_bias", None)
    if isinstance(further, Tensor):
        bias = further.reshape(-1) if bias is None else bias + further.reshape(-1)
    return FusedHead(model, layer, Projection(layer.weight, bias, scale, softcap))


def fused_options(head: Head) -> dict[str, Any]:
    """Return the options of a head's cross entropy, which the fused loss takes too.

    Raises:
        ValueError: If its terms are not those of a cross entropy.
    """
    if isinstance(head.terms, partial) and head.terms.func is cross_entropy_terms:
        return head.terms.keywords
    raise ValueError("its terms must be those of a cross entropy, got others from rdrop_head")


@contextmanager
def _exposed_input(model: nn.Module, layer: nn.Linear) -> Iterator[list[torch.dtype | None]]:
    """Show the layer the first position alone, and the caller all that it would have read.

    Yields:
        For every call of the layer, autocast's dtype; None without autocast.
    """
    read: list[Tensor] = []
    dtypes: list[torch.dtype | None] = []

    def before_layer(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        shapes = [tuple(x.shape) for x in args]
        if [len(shape) for shape in shapes] != [3]:
            raise ValueError(
                f"its last layer must read states (batch, length, features), got shapes {shapes}"
            )
        (hidden,) = args
        is_cast = casts_itself(hidden.device)
        dtypes.append(torch.get_autocast_dtype(hidden.device.type) if is_cast else None)
        read.append(hidden)
        return (hidden[:, :1],)

    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        if len(read) != 1:
            raise ValueError(f"its forward must call its last layer once, got {len(read)} calls")
        output[_field(output)] = (read.pop(),)

    handles = [
        layer.register_forward_pre_hook(before_layer),
        model.register_forward_hook(after_model),
    ]
    try:
        yield dtypes
    finally:
        for handle in handles:
            handle.remove()


def _field(output: Any) -> str:
    known = {field.name for field in fields(output)} if hasattr(output, "to_tuple") else set()
    for name in _FIELDS:
        if name in known:
            return name
    raise ValueError(f"its output must have hidden states, got {type(output).__name__}")


def _number(holders: tuple[Any, ...], name: str) -> float | None:
    for holder in holders:
        value = getattr(holder, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None
