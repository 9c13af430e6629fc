"""Is the loss that R-Drop computes the model's own?"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.diagnostics import extra_pass
from regdrop.integrations.transformers.forward import auxiliary_loss
from regdrop.integrations.transformers.heads import base_model, find_head
from regdrop.loss import combine_terms


def check_own_loss(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Compare the likelihood of one batch with the loss that the model returns for it.

    A model may have a loss of its own behind a familiar name. One evaluation of one batch, which
    leaves the run as it was, tells it from those that R-Drop knows.

    Args:
        model: An unwrapped Hugging Face model.
        inputs: A batch with its labels.

    Raises:
        ValueError: If they differ, by the model's name.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        own, ours, dtype = extra_pass(model.eval(), partial(_losses, model), dict(inputs))
    finally:
        for module, mode in modes.items():
            module.training = mode
    if own is None:
        return
    tolerance = 1e-2 if dtype in (torch.float32, torch.float64) else 5e-2
    own = own.to(ours.dtype)
    if not torch.isclose(ours, own, rtol=tolerance, atol=1e-5, equal_nan=True) and own.isfinite():
        raise ValueError(
            f"{type(base_model(model)).__name__} has a loss of its own ({own.item():.6g} on the "
            f"first batch, where R-Drop's likelihood is {ours.item():.6g}); R-Drop would bypass "
            "it: override RDropTrainerMixin.rdrop_head to say what is minimised"
        )


def _losses(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor, torch.dtype]:
    """Return the model's own loss, the likelihood that R-Drop would minimise, and its dtype."""
    output: Any = model(**inputs)
    head = find_head(model, inputs)
    logits = head.outputs(output)
    terms = head.terms(logits, head.target, num_passes=1)
    ours: Tensor = combine_terms(terms, alpha=0.0, num_passes=1).loss
    auxiliary = auxiliary_loss(model, output)
    ours = ours if auxiliary is None else ours + auxiliary
    return getattr(output, "loss", None), ours, logits.dtype
