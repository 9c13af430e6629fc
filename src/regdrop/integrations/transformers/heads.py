"""What a model predicts: from a Hugging Face model and its labels to the terms of the loss."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regdrop.loss import (
    TermsFunction,
    binary_cross_entropy_terms,
    cross_entropy_terms,
    mse_terms,
)

# Heads whose loss is decided by config.problem_type.
_CLASSIFICATION = ("ForSequenceClassification", "ForImageClassification")


class Head(NamedTuple):
    """How one model's outputs and labels enter the loss.

    Attributes:
        terms: The output family's terms of each item, its options bound.
        target: The labels in the shape that the terms expect.
        single_output: Whether logits (batch, 1) are one number an item.
        class_weight: Weight of each class in the likelihood, bound in `terms` too.
    """

    terms: TermsFunction
    target: Tensor
    single_output: bool = False
    class_weight: Tensor | None = None

    def outputs(self, model_output: Any) -> Tensor:
        """Return the logits (or predictions) of a model's output."""
        logits: Tensor = (
            model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        )
        return logits.reshape(logits.shape[0]) if self.single_output else logits

    def num_items(self) -> Tensor:
        """Return the number of items that count: the denominator of the divergence's mean."""
        return self.target.ne(-100).sum()

    def total_weight(self) -> Tensor:
        """Return the denominator of the likelihood's mean."""
        if self.class_weight is None:
            return self.num_items()
        return (self.class_weight[self.target.clamp(min=0)] * self.target.ne(-100)).sum()


def base_model(model: nn.Module) -> nn.Module:
    """Return the model itself where PEFT has wrapped it."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def find_head(
    model: nn.Module,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | None = None,
) -> Head:
    """Choose the terms of the loss by the model's class and the library's own rule.

    Args:
        model: An unwrapped Hugging Face model for sequence or image classification.
        labels: The labels of the batch.
        label_smoothing: Smoothing of the likelihood's target.
        class_weight: Weight of each class in the likelihood.

    Raises:
        ValueError: For a model whose loss is another one, or options that its outputs do not have.
    """
    model = base_model(model)
    name = type(model).__name__
    if not name.endswith(_CLASSIFICATION):
        raise ValueError(
            f"model must be one of {', '.join('*' + suffix for suffix in _CLASSIFICATION)}, "
            f"got {name}; for another head override RDropTrainerMixin.rdrop_head"
        )
    if getattr(model, "_loss_function", None) is not None:
        raise ValueError(
            f"{name} has a loss_function of its own, which R-Drop would bypass; "
            "override RDropTrainerMixin.rdrop_head"
        )
    config: Any = model.config
    problem_type = config.problem_type or _problem_type(config.num_labels, labels)
    if problem_type == "single_label_classification":
        weight = _class_weight(class_weight, config.num_labels, labels.device)
        terms = partial(cross_entropy_terms, weight=weight, label_smoothing=label_smoothing)
        return Head(terms, labels.reshape(-1), class_weight=weight)
    if class_weight is not None or label_smoothing:
        raise ValueError(
            f"class_weight and label_smoothing need single-label classification, "
            f"got problem_type={problem_type!r}"
        )
    if problem_type == "multi_label_classification":
        return Head(binary_cross_entropy_terms, labels)
    if problem_type == "regression":
        single = config.num_labels == 1
        return Head(mse_terms, labels.reshape(-1) if single else labels, single)
    raise ValueError(
        "config.problem_type must be None, 'single_label_classification', "
        f"'multi_label_classification' or 'regression', got {problem_type!r}"
    )


def _problem_type(num_labels: int, labels: Tensor) -> str:
    """Return what transformers infers where config.problem_type is None."""
    if num_labels == 1:
        return "regression"
    if labels.dtype in (torch.long, torch.int):
        return "single_label_classification"
    return "multi_label_classification"


def _class_weight(
    weight: Sequence[float] | None, num_labels: int, device: torch.device
) -> Tensor | None:
    if weight is None:
        return None
    if len(weight) != num_labels:
        raise ValueError(
            f"class_weight must have one entry for each of {num_labels} labels, got {len(weight)}"
        )
    return torch.tensor(weight, device=device)
