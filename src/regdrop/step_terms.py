"""The terms of a step's loss: by a name, with the config's options, or of one's own."""

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
from regdrop.passes import map_rows

Loss = Literal["cross_entropy", "binary_cross_entropy", "mse"]


def find_terms(
    loss: Loss | Callable[..., ItemTerms], config: RDropConfig, device: torch.device | None
) -> TermsFunction:
    """Return the terms of a loss by its name, with the config's options, or of one's own.

    Args:
        loss: As in `rdrop_step`.
        config: The options.
        device: That of the target, for class weights.

    Raises:
        ValueError: For an unknown loss, and options that need a trainer or another loss.
    """
    if config.likelihood == "model":
        raise ValueError(
            "likelihood='model' is for trainers, whose model returns a loss; give rdrop_step a "
            "function of terms as loss instead"
        )
    if config.dropout_rates is not None:
        raise ValueError(
            f"dropout_rates={config.dropout_rates} must hold until the backward has ended: leave "
            "it out of the config and run rdrop_step and backward inside "
            "regdrop.dropout_rates(model, rates)"
        )
    if config.method == "r3f":
        raise ValueError("method='r3f' adds noise to a model's embeddings: it needs RDropTrainer")
    name_of_loss = loss if isinstance(loss, str) else None
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
            raise ValueError(
                f"{name}={getattr(config, name)!r} is an option of loss='cross_entropy'; bind it "
                "to your terms by functools.partial"
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
    return cut_outputs_of(loss)


def cut_outputs_of(terms: Callable[..., ItemTerms]) -> TermsFunction:
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
            if "num_passes" not in str(error):
                raise
            raise TypeError(
                "loss must be a name or a function of stacked outputs, the target and num_passes "
                f"that returns regdrop.loss.ItemTerms, got {terms!r} ({error})"
            ) from error
        if not isinstance(found, ItemTerms):
            raise TypeError(f"loss must return regdrop.loss.ItemTerms, got {type(found).__name__}")
        # Who counts may do so in Python.
        return found._replace(
            nll_count=torch.as_tensor(found.nll_count), kl_count=torch.as_tensor(found.kl_count)
        )

    return cut_terms


def _cut(outputs: Any, num_passes: int, backward_passes: int) -> Any:
    def cut(output: Tensor) -> Tensor:
        passes = output.unflatten(0, (num_passes, -1))
        return limit_backward(passes, backward_passes).flatten(0, 1)

    return map_rows(cut, outputs)
