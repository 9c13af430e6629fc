"""Whether the loss takes over the last layer of a model, and why not where it should."""

import warnings
from typing import Any

from accelerate.utils import is_compiled_module
from torch import nn

from regdrop.heads import Head
from regdrop.integrations.transformers.forward.verify import check_fused_head
from regdrop.integrations.transformers.heads.registry import base_model

# With fewer words the logits are no larger than what a model keeps for its backward anyway.
SMALLEST_FUSED_VOCABULARY = 8192


def chooses_fused(trainer: Any, model: nn.Module, head: Head) -> bool:
    """Return whether the loss takes the last layer over; tell where it should and cannot.

    Args:
        trainer: An `RDropTrainerMixin`.
        model: The model, wrapped as it is trained.
        head: The head of the first batch.

    Raises:
        ValueError: If `fused_linear=True` cannot be had.
    """
    rdrop = trainer.rdrop
    wanted = rdrop.fused_linear
    if wanted == "auto":
        wanted = (head.vocabulary or 0) >= SMALLEST_FUSED_VOCABULARY
    # Fraternal dropout compares logits, and the eager form keeps them.
    if not wanted or rdrop.method == "fraternal" or rdrop.impl == "eager":
        return False
    unwrapped = trainer._unwrapped(model)
    try:
        if head.vocabulary is None:
            raise ValueError("its head is not one linear layer over a vocabulary")
        if trainer._splits_parameters() or trainer.get_tp_size() > 1:
            raise ValueError("its last layer is spread over processes")
        if trainer.args.torch_compile or is_compiled_module(model) or _is_compiled(unwrapped):
            raise ValueError("it is compiled")
        check_fused_head(unwrapped, head)
    except ValueError as error:
        name = type(base_model(unwrapped)).__name__
        if rdrop.fused_linear is True:
            raise ValueError(f"fused_linear=True does not work for {name}: {error}") from error
        warnings.warn(
            f"the last layer of {name} and the loss are not computed in one: {error}. "
            "Training is the same and needs memory for all logits; fused_linear=False says so.",
            stacklevel=2,
        )
        return False
    return True


def _is_compiled(model: nn.Module) -> bool:
    """Return whether a model is compiled in place, by `model.compile()`."""
    return any(part._compiled_call_impl is not None for part in (model, base_model(model)))
