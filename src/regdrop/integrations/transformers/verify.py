"""Does R-Drop compute what the model computes: its own loss, and the logits of its last layer?"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.diagnostics import extra_pass
from regdrop.integrations.transformers.forward import auxiliary_loss
from regdrop.integrations.transformers.fused import find_fused_head, fused_options
from regdrop.integrations.transformers.heads import Head, base_model, find_head
from regdrop.kernels import project
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
    with _evaluation(model):
        own, ours, dtype = extra_pass(model, partial(_losses, model), dict(inputs))
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


def check_fused_head(model: nn.Module, head: Head) -> None:
    """Compare the logits that the fused loss stands for with those that the model returns.

    One evaluation of the first position of one batch, which leaves the run as it was, shows
    whether a model does more to its logits than its last layer and its config tell.

    Args:
        model: An unwrapped Hugging Face model.
        head: The head of a batch.

    Raises:
        ValueError: If they differ or the head is of another kind; says why.
    """
    fused_options(head)
    fused = find_fused_head(model)
    with _evaluation(model):
        try:
            output, hidden, projection = extra_pass(model, partial(fused.run, model), head.inputs)
        except RuntimeError as error:
            raise ValueError(f"its forward needs the logits of every position ({error})") from error
    if hidden.shape[:-1] != head.target.shape:
        raise ValueError(
            f"its last layer must read one state for each label, {tuple(head.target.shape)}, "
            f"got {tuple(hidden.shape[:-1])}"
        )
    own = head.outputs(output)
    with torch.no_grad():
        ours = project(hidden[:, :1], projection)
    tolerance = 1e-3 if projection.dtype in (None, torch.float32) else 1e-2
    tolerance = max(tolerance, 4 * torch.finfo(own.dtype).eps)
    is_same = own.shape == ours.shape and bool(
        (own.to(ours.dtype) - ours).norm() <= tolerance * ours.norm()
    )
    if not is_same:
        raise ValueError("its logits are not those of its last layer, its bias, scale and soft cap")


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode; the modes of all its modules come back on exit."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
