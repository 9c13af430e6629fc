"""Heads that choose among a model's labels: for a sequence, an image, a sound, a token, a pixel."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regdrop.heads import Head, read_logits, read_output
from regdrop.integrations.transformers.heads.batch import LabelledBatch
from regdrop.loss import ItemCounts, ItemTerms, binary_cross_entropy_terms, mse_terms


def classification(batch: LabelledBatch) -> Head:
    """Sequences, images, sounds, videos: one label, several, or regression, by problem_type."""
    labels, config = batch.pop(), batch.model.config
    problem_type = config.problem_type or _problem_type(config.num_labels, labels)
    if problem_type == "single_label_classification":
        outputs = partial(_rows_of_logits, num_labels=config.num_labels)
        return batch.classes(labels.reshape(-1), config.num_labels, outputs)
    batch.refuse_options(f"single-label classification, got problem_type={problem_type!r}")
    if problem_type == "multi_label_classification":
        return Head(batch.inputs, labels, binary_cross_entropy_terms, is_guessed=True)
    if problem_type == "regression":
        if config.num_labels > 1:
            return Head(batch.inputs, labels, mse_terms, is_guessed=True)
        return Head(batch.inputs, labels.reshape(-1), mse_terms, _flat_logits, is_guessed=True)
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


def _rows_of_logits(output: Any, num_labels: int) -> Tensor:
    # Some have a dimension of one query between.
    return read_logits(output).reshape(-1, num_labels)


def _flat_logits(output: Any) -> Tensor:
    return read_logits(output).flatten()


def tokens(batch: LabelledBatch) -> Head:
    """One label a token."""
    labels = batch.pop()
    # PEFT itself leaves the labels of learned positions to the caller, who may have padded them.
    words = batch.inputs.get("input_ids", batch.inputs.get("inputs_embeds"))
    if words is not None and labels.shape[1] == words.shape[1]:
        labels = batch.pad_prompt(labels)
    return batch.classes(labels, batch.model.config.num_labels)


def next_sentence(batch: LabelledBatch) -> Head:
    """Whether the second sentence follows the first."""
    return batch.classes(batch.pop().reshape(-1), 2)


def frames(batch: LabelledBatch) -> Head:
    """One label a frame of sound, given as one-hot rows."""
    labels = batch.pop()
    count: int = batch.model.config.num_labels
    if labels.dim() != 3 or labels.shape[-1] != count:
        raise ValueError(
            f"labels of {batch.name} must be one-hot, (batch, frames, {count}), as its own loss "
            f"reads them, got shape {tuple(labels.shape)}"
        )
    return batch.classes(labels.argmax(-1), count)


def choices(batch: LabelledBatch) -> Head:
    """The right one of several choices, which have no weights: their order means nothing."""
    if batch.class_weight is not None:
        raise ValueError(f"class_weight needs classes, and choices are none ({batch.name})")
    return batch.classes(batch.pop())


def spans(batch: LabelledBatch) -> Head:
    """Question answering: the first and the last token of the answer, two items a sample."""
    batch.refuse_options("classes, and the ends of an answer are positions")
    ends = [batch.pop(name).reshape(-1) for name in ("start_positions", "end_positions")]
    words = batch.inputs.get("input_ids")
    words = batch.inputs["inputs_embeds"] if words is None else words
    length = words.shape[1] + batch.virtual_tokens
    # An answer beyond the truncated text counts in neither term, as in the library.
    target = torch.stack(ends, dim=1).clamp(0, length)

    def outputs(output: Any) -> Tensor:
        return torch.stack(
            [read_output(output, "start_logits"), read_output(output, "end_logits")], dim=1
        )

    return batch.classes(target, outputs=outputs, ignore_index=length)


def pixels(batch: LabelledBatch) -> Head:
    """One label a pixel, of logits that are enlarged to the size of the labels."""
    config = batch.model.config
    head = _pixels_head(batch)
    weight = getattr(config, "auxiliary_loss_weight", 0)
    if getattr(batch.model, "auxiliary_head", None) is not None and weight:
        raise batch.unknown(
            f"adds the loss of an auxiliary head, times {weight}, whose logits its output does not "
            "show: config.use_auxiliary_head=False leaves it out",
            head,
        )
    return head


def _pixels_head(batch: LabelledBatch) -> Head:
    labels, config = batch.pop(), batch.model.config
    ignored: int = getattr(config, "semantic_loss_ignore_index", 255)
    ignored = getattr(config, "loss_ignore_index", ignored)
    size = labels.shape[-2:]

    def outputs(output: Any) -> Tensor:
        logits = read_logits(output)
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits.movedim(1, -1)

    if config.num_labels > 1:
        return batch.classes(labels, config.num_labels, outputs, ignore_index=ignored)
    batch.refuse_options(f"several classes a pixel, got num_labels={config.num_labels}")
    terms = partial(_binary_pixels, ignore_index=ignored)
    count = partial(_count_binary_pixels, ignore_index=ignored)
    return Head(batch.inputs, labels, terms, lambda out: outputs(out).squeeze(-1), count=count)


def _binary_pixels(
    logits: Tensor, target: Tensor, /, *, ignore_index: int, **passes: Any
) -> ItemTerms:
    """Return the terms of pixels that show a thing or do not, by the library's own mean."""
    counted = _counted_pixels(target, ignore_index)
    terms = binary_cross_entropy_terms(logits, target.float(), mask=counted, **passes)
    counts = _count_binary_pixels(target, ignore_index)
    return terms._replace(nll_count=counts.nll, kl_count=counts.kl)


def _count_binary_pixels(target: Tensor, ignore_index: int) -> ItemCounts:
    """Return all pixels, by which transformers divides the NLL, and those that count."""
    every = torch.full((), target.numel(), device=target.device)
    return ItemCounts(every, _counted_pixels(target, ignore_index).sum())


def _counted_pixels(target: Tensor, ignore_index: int) -> Tensor:
    return (target >= 0) & (target != ignore_index)
