"""What a model predicts: from a Hugging Face model and its batch to the terms of the loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from regdrop.heads import Head, UnknownHeadError
from regdrop.integrations.transformers.heads_batch import WAY_OUT, LabelledBatch, base_model
from regdrop.integrations.transformers.heads_classes import (
    choices,
    classification,
    frames,
    next_sentence,
    pixels,
    spans,
    tokens,
)
from regdrop.integrations.transformers.heads_speech import transcription
from regdrop.integrations.transformers.heads_words import adaptive, aligned, causal, generation

__all__ = ["Head", "base_model", "find_head"]


def known_suffixes() -> tuple[str, ...]:
    """Return the ends of the names of the classes that are known."""
    return tuple(suffix for suffixes, _ in _HEADS for suffix in suffixes)


def find_head(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | None = None,
    unlabelled_index: int | None = None,
    label_names: Sequence[str] | None = None,
) -> Head:
    """Choose the terms of the loss by the model's class and the library's own rules.

    Args:
        model: An unwrapped Hugging Face model; PEFT may have wrapped it.
        inputs: A batch with its labels; never changed.
        label_smoothing: Smoothing of the likelihood's target.
        class_weight: Weight of each class in the likelihood.
        unlabelled_index: Label of items that count in the divergence alone.
        label_names: What the batch calls its labels, for the message where that is another name
            than the model's.

    Raises:
        UnknownHeadError: For a head that is not known or has a loss of its own.
        ValueError: For a batch without its labels, or options that the model's outputs do not have.
    """
    batch = LabelledBatch.enter(
        model,
        inputs,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        unlabelled_index=unlabelled_index,
        label_names=label_names or (),
    )
    for suffixes, loss in _OTHER_LOSSES:
        if batch.name.endswith(suffixes):
            raise batch.unknown(f"has a loss of its own, {loss}")
    for suffixes, build in _HEADS:
        if batch.name.endswith(suffixes):
            if not getattr(batch.model.config, "return_dict", True):
                # Heads read outputs by name.
                batch.inputs["return_dict"] = True
            return build(batch)
    known = ", ".join(f"*{suffix}" for suffix in known_suffixes())
    raise UnknownHeadError(f"model must be one of {known}, got {batch.name}; {WAY_OUT}")


# By the end of the class's name; the first that fits.
_OTHER_LOSSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("XLNetForQuestionAnswering", "XLMForQuestionAnswering", "FlaubertForQuestionAnswering"),
        "that of a beam over the answer's first and last token",
    ),
    (("ProphetNetForConditionalGeneration", "ProphetNetForCausalLM"), "that of several next words"),
    (("BlipForConditionalGeneration",), "with label smoothing"),
    (("GitForCausalLM",), "that of the positions behind a picture"),
    (("ShieldGemma2ForImageClassification",), "that of words, where its logits are yes and no"),
    (("DiarizationForAudioFrameClassification",), "of several speakers a frame"),
)
# Decoders whose labels the caller has moved already, and one whose decoder inputs are; encoders
# under older names.
_ALIGNED = (
    "ForMaskedLM",
    "WithLMHeadModel",
    "XLNetLMHeadModel",
    "PPFormulaNetForConditionalGeneration",
    "BartForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM",
    "MarianForCausalLM",
    "MvpForCausalLM",
    "PegasusForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
)
_HEADS: tuple[tuple[tuple[str, ...], Callable[[LabelledBatch], Head]], ...] = (
    (
        (
            "ForSequenceClassification",
            "ForImageClassification",
            "ForAudioClassification",
            "ForVideoClassification",
        ),
        classification,
    ),
    (("ForTokenClassification",), tokens),
    (("ForNextSentencePrediction",), next_sentence),
    (("ForAudioFrameClassification",), frames),
    (("ForSemanticSegmentation",), pixels),
    (("ForMultipleChoice",), choices),
    (("ForCTC",), transcription),
    (("ForQuestionAnswering", "ForQuestionAnsweringSimple"), spans),
    (_ALIGNED, aligned),
    (("AdaptiveInputForCausalLM",), adaptive),
    (("ForCausalLM", "LMHeadModel", "ReformerModelWithLMHead", "BertGenerationDecoder"), causal),
    (
        (
            "ForConditionalGeneration",
            "MTModel",
            "EncoderDecoderModel",
            "ForTextToText",
            "ForSpeechToText",
            "ForVisionText2Text",
        ),
        generation,
    ),
)
