"""What a model predicts: from a Hugging Face model and its batch to the terms of the loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regdrop.heads import Head, read_logits, read_output
from regdrop.loss import (
    adaptive_softmax_terms,
    binary_cross_entropy_terms,
    cross_entropy_terms,
    mse_terms,
)

_IGNORED = -100


def base_model(model: nn.Module) -> nn.Module:
    """Return the model itself where PEFT has wrapped it."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def find_head(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | None = None,
) -> Head:
    """Choose the terms of the loss by the model's class and the library's own rules.

    Args:
        model: An unwrapped Hugging Face model.
        inputs: A batch with its labels; never changed.
        label_smoothing: Smoothing of the likelihood's target.
        class_weight: Weight of each class in the likelihood.

    Raises:
        ValueError: For a head that is not known, a batch without its labels, or options that the
            model's outputs do not have.
    """
    model = base_model(model)
    name = type(model).__name__
    for suffixes, build in _HEADS:
        if name.endswith(suffixes):
            return build(model, dict(inputs), label_smoothing, class_weight)
    known = ", ".join(f"*{suffix}" for suffixes, _ in _HEADS for suffix in suffixes)
    raise ValueError(
        f"model must be one of {known}, got {name}; "
        "for another head override RDropTrainerMixin.rdrop_head"
    )


def _classification(
    model: Any, inputs: dict[str, Any], smoothing: float, weight: Sequence[float] | None
) -> Head:
    """Sequences and images: single-label, multi-label or regression, by config.problem_type."""
    labels, config = _pop(inputs, "labels"), model.config
    problem_type = config.problem_type or _problem_type(config.num_labels, labels)
    if problem_type == "single_label_classification":
        return _classes(inputs, labels.reshape(-1), config.num_labels, smoothing, weight)
    if weight is not None or smoothing:
        raise ValueError(
            "class_weight and label_smoothing need single-label classification, "
            f"got problem_type={problem_type!r}"
        )
    if problem_type == "multi_label_classification":
        return Head(inputs, labels, binary_cross_entropy_terms)
    if problem_type == "regression":
        if config.num_labels > 1:
            return Head(inputs, labels, mse_terms)
        return Head(inputs, labels.reshape(-1), mse_terms, lambda out: read_logits(out).flatten())
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


def _tokens(
    model: Any, inputs: dict[str, Any], smoothing: float, weight: Sequence[float] | None
) -> Head:
    """One label a token."""
    return _classes(inputs, _pop(inputs, "labels"), model.config.num_labels, smoothing, weight)


def _masked(
    model: Any, inputs: dict[str, Any], smoothing: float, weight: Sequence[float] | None
) -> Head:
    """The words behind masked tokens."""
    return _words(model, inputs, _pop(inputs, "labels"), smoothing, weight)


def _choices(
    model: Any, inputs: dict[str, Any], smoothing: float, weight: Sequence[float] | None
) -> Head:
    """The right one of several choices, which have no weights: their order means nothing."""
    if weight is not None:
        raise ValueError("class_weight does not apply to multiple choice")
    return _classes(inputs, _pop(inputs, "labels"), None, smoothing, None)


def _causal(
    model: Any, inputs: dict[str, Any], smoothing: float, weight: Sequence[float] | None
) -> Head:
    """The next token: the labels move by one, and the last position counts no more."""
    return _words(model, inputs, _pop_next_tokens(inputs), smoothing, weight)


def _adaptive(
    model: Any, inputs: dict[str, Any], smoothing: float, weight: Sequence[float] | None
) -> Head:
    """The next token behind an adaptive softmax, whose full logits never exist."""
    if weight is not None or smoothing:
        raise ValueError("class_weight and label_smoothing do not apply to an adaptive softmax")
    target = _pop_next_tokens(inputs)
    terms = partial(adaptive_softmax_terms, softmax=model.adaptive_softmax())
    inputs["return_logits"] = False
    return Head(inputs, target, terms, lambda output: read_output(output, "softmax_states"))


def _generation(
    model: Any, inputs: dict[str, Any], smoothing: float, weight: Sequence[float] | None
) -> Head:
    """An encoder-decoder: the decoder reads the labels moved right, and predicts them."""
    if not model.config.is_encoder_decoder:
        return _causal(model, inputs, smoothing, weight)
    labels = _pop(inputs, "labels")
    if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        # Without labels the model would read its own input.
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return _words(model, inputs, labels, smoothing, weight)


def _spans(
    model: Any, inputs: dict[str, Any], smoothing: float, weight: Sequence[float] | None
) -> Head:
    """Question answering: the first and the last token of the answer, two items a sample."""
    if weight is not None or smoothing:
        raise ValueError("class_weight and label_smoothing do not apply to question answering")
    ends = [_pop(inputs, name).reshape(-1) for name in ("start_positions", "end_positions")]
    words = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    length = words.shape[1]
    # An answer beyond the truncated text counts in neither term, as in the library.
    target = torch.stack(ends, dim=1).clamp(0, length)
    terms = partial(cross_entropy_terms, ignore_index=length)

    def outputs(output: Any) -> Tensor:
        return torch.stack([read_output(output, "start_logits"), read_output(output, "end_logits")], dim=1)

    return Head(inputs, target, terms, outputs, takes_kernel=True)


def _classes(
    inputs: dict[str, Any],
    target: Tensor,
    num_labels: int | None,
    smoothing: float,
    weight: Sequence[float] | None,
) -> Head:
    if weight is not None and num_labels is not None and len(weight) != num_labels:
        raise ValueError(
            f"class_weight must have one entry for each of {num_labels} labels, got {len(weight)}"
        )
    class_weight = None if weight is None else torch.tensor(weight, device=target.device)
    terms = partial(cross_entropy_terms, weight=class_weight, label_smoothing=smoothing)
    return Head(inputs, target, terms, takes_kernel=True)


def _words(
    model: Any,
    inputs: dict[str, Any],
    target: Tensor,
    smoothing: float,
    weight: Sequence[float] | None,
) -> Head:
    size: int = model.config.get_text_config().vocab_size
    return replace(_classes(inputs, target, size, smoothing, weight), vocabulary=size)


def _pop_next_tokens(inputs: dict[str, Any]) -> Tensor:
    """Return the labels moved by one."""
    labels = _pop(inputs, "labels")
    # Padding the labels leaves the logits as they are; slicing them would copy a vocabulary.
    shifted: Tensor | None = inputs.pop("shift_labels", None)
    return F.pad(labels[..., 1:], (0, 1), value=_IGNORED) if shifted is None else shifted


def _pop(inputs: dict[str, Any], name: str) -> Tensor:
    labels = inputs.pop(name, None)
    if not isinstance(labels, Tensor):
        raise ValueError(f"inputs must hold a tensor named {name!r}, got {sorted(inputs)}")
    return labels


# By the end of the class's name; the first that fits.
_HEADS: tuple[tuple[tuple[str, ...], Callable[..., Head]], ...] = (
    (("ForSequenceClassification", "ForImageClassification"), _classification),
    (("ForTokenClassification",), _tokens),
    (("ForMaskedLM",), _masked),
    (("ForMultipleChoice",), _choices),
    (("ForQuestionAnswering",), _spans),
    (("AdaptiveInputForCausalLM",), _adaptive),
    (("ForCausalLM", "LMHeadModel"), _causal),
    (("ForConditionalGeneration", "MTModel"), _generation),
)
