"""The terms of a step's loss: by a name, with the config's options, or of one's own."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from regdrop.config import RDropConfig
from regdrop.kernels.backward_passes import limit_backward
from regdrop.loss import (
    ItemTerms,
    TermsFunction,
    binary_cross_entropy_terms,
    cross_entropy_terms,
    fraternal_terms,
    is_counted,
    mse_terms,
)
from regdrop.loss.class_weight import class_weight_on
from regdrop.passes import find_tensors, map_rows
from regdrop.tracing import can_read

Loss = Literal["cross_entropy", "binary_cross_entropy", "mse"]

_TERMS_OF_LOSSES = {
    "rdrop_cross_entropy": "cross_entropy_terms",
    "RDropCrossEntropyLoss": "cross_entropy_terms",
    "rdrop_binary_cross_entropy_with_logits": "binary_cross_entropy_terms",
    "RDropBCEWithLogitsLoss": "binary_cross_entropy_terms",
    "rdrop_mse_loss": "mse_terms",
    "RDropMSELoss": "mse_terms",
    "rdrop_l1_loss": "l1_terms",
    "RDropL1Loss": "l1_terms",
    "rdrop_smooth_l1_loss": "smooth_l1_terms",
    "RDropSmoothL1Loss": "smooth_l1_terms",
}


def find_terms(
    loss: Loss | Callable[..., ItemTerms],
    config: RDropConfig,
    device: torch.device | None,
    num_items: Tensor | float | None = None,
) -> TermsFunction:
    """Return the terms of a loss by its name, with the config's options, or of one's own.

    Args:
        loss: As in `rdrop_step`.
        config: The options.
        device: That of the target, for class weights.
        num_items: What both terms will be divided by instead of their own counts. Terms of one's
            own that are a mean already are then warned about.

    Raises:
        ValueError: For an unknown loss, and options that need a trainer or another loss.
    """
    if config.likelihood == "model":
        raise ValueError(
            "likelihood='model' is for trainers, whose model returns a loss; give rdrop_step a "
            "function of terms as loss instead"
        )
    if config.fused_linear is True:
        raise ValueError(
            "fused_linear=True needs RDropTrainer, which knows a model's last layer; "
            "linear_rdrop_cross_entropy is the loss behind one for a loop of your own"
        )
    if config.dropout_rates is not None:
        raise ValueError(
            f"dropout_rates={config.dropout_rates} must hold until the backward has ended: leave "
            "it out of the config and run rdrop_step and backward inside "
            "regdrop.dropout_rates(model, rates)"
        )
    if config.method == "r3f":
        raise ValueError("method='r3f' adds noise to a model's embeddings: it needs RDropTrainer")
    is_named = isinstance(loss, str)
    name_of_loss = loss if is_named else None
    if name_of_loss == "cross_entropy":
        options: dict[str, Any] = {"unlabelled_index": config.unlabelled_index}
        if config.class_weight is not None:
            options["weight"] = class_weight_on(device, config.class_weight)
        if config.method == "fraternal":
            return partial(fraternal_terms, **options)
        return partial(cross_entropy_terms, impl=config.impl, **options)
    for name, default in (
        ("class_weight", None),
        ("unlabelled_index", None),
        ("impl", "auto"),
        ("method", "rdrop"),
    ):
        if getattr(config, name) != default:
            advice = "bind what your terms take to them by functools.partial"
            if is_named:
                advice = f"loss={loss!r} has no such option"
            raise ValueError(
                f"{name}={getattr(config, name)!r} is an option of loss='cross_entropy'; {advice}"
            )
    if name_of_loss == "binary_cross_entropy":
        return binary_cross_entropy_terms
    if name_of_loss == "mse":
        return mse_terms
    if not callable(loss):
        raise ValueError(
            "loss must be 'cross_entropy', 'binary_cross_entropy', 'mse' or a function of terms, "
            f"got {loss!r}"
        )
    return cut_outputs_of(loss, num_items)


def cut_outputs_of(
    terms: Callable[..., ItemTerms], num_items: Tensor | float | None = None
) -> TermsFunction:
    """Return terms whose gradient ends at `backward_passes` also where they know nothing of it.

    The library's own cut the gradient in their kernels, which saves memory. For others the outputs
    are cut before they see them, so that nobody has to scale a gradient by hand.
    """
    if is_counted(terms):
        return terms

    def cut_terms(
        outputs: Any,
        target: Any,
        /,
        *,
        num_passes: int,
        backward_passes: int | None = None,
    ) -> ItemTerms:
        if backward_passes is not None and backward_passes < num_passes:
            outputs = _cut(outputs, num_passes, backward_passes)
        try:
            found = terms(outputs, target, num_passes=num_passes)
        except TypeError as error:
            if _takes_passes(terms, str(error)):
                raise
            raise TypeError(
                "loss must be a name or a function of stacked outputs, the target and num_passes "
                f"that returns regdrop.loss.ItemTerms, got {terms!r} ({error})"
                f"{_ways_out(terms)}"
            ) from error
        if not isinstance(found, ItemTerms):
            raise TypeError(
                f"loss must return regdrop.loss.ItemTerms, got {type(found).__name__}"
                f"{_ways_out(terms)}"
            )
        # Who counts may do so in Python.
        found = found._replace(
            nll_count=torch.as_tensor(found.nll_count), kl_count=torch.as_tensor(found.kl_count)
        )
        if num_items is not None:
            _warn_of_means(found, target, num_items)
        return found

    return cut_terms


def _warn_of_means(terms: ItemTerms, target: Any, num_items: Tensor | float) -> None:
    """Warn where a mean over the rows of a target will be divided by a number of items again.

    Less than the rows of this one target may be a number of micro-batches, by which means are to be
    divided.
    """
    number, count = torch.as_tensor(num_items), terms.nll_count
    if terms.nll.dim() or not (can_read(number.device) and can_read(count.device)):
        return
    rows = max((tensor.size(0) for tensor in find_tensors(target) if tensor.dim()), default=0)
    if count.item() == 1 and 1 < rows <= number.item():
        warnings.warn(
            f"loss returned one number with nll_count=1 for {rows} rows, as for a mean, and "
            f"num_items={number.item():g} divides it once more: return sums and their counts, or "
            "leave num_items out and divide by the counts of the window inside the loss "
            "(docs/recipes.md, two heads)",
            stacklevel=2,
        )


def _takes_passes(terms: Callable[..., Any], error: str) -> bool:
    """Return whether a function takes outputs, target and num_passes: then an error is its own."""
    if "num_passes" in error:  # a module's signature takes anything
        return False
    try:
        inspect.signature(terms).bind(None, None, num_passes=2)
    except TypeError:
        return False
    except ValueError:  # a function without a signature, as some of C++ are
        return True
    return True


def _ways_out(terms: Callable[..., Any]) -> str:
    """Return what to give instead of a loss of this library; empty for other functions."""
    while isinstance(terms, partial):
        terms = terms.func
    found = _TERMS_OF_LOSSES.get(getattr(terms, "__name__", type(terms).__name__))
    if found is None:
        return ""
    return f"; that is a whole loss: give its terms, regdrop.loss.{found}"


def _cut(outputs: Any, num_passes: int, backward_passes: int) -> Any:
    def cut(output: Tensor) -> Tensor:
        passes = output.unflatten(0, (num_passes, -1))
        return limit_backward(passes, backward_passes).flatten(0, 1)

    return map_rows(cut, outputs)
