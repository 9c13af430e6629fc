"""What a model predicts: from a Hugging Face model and its batch to the terms of the loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from regdrop.heads import Head, UnknownHeadError
from regdrop.integrations.transformers.heads.batch import WAY_OUT, LabelledBatch, base_model
from regdrop.integrations.transformers.heads.classes import (
    choices,
    classification,
    frames,
    next_sentence,
    pixels,
    spans,
    tokens,
)
from regdrop.integrations.transformers.heads.speech import transcription
from regdrop.integrations.transformers.heads.words import aligned, causal, generation

__all__ = [
    "Head",
    "HeadBuilder",
    "LabelledBatch",
    "base_model",
    "find_head",
    "has_registered_class",
    "known_endings",
    "register_head",
]

HeadBuilder = Callable[[LabelledBatch], Head]

_OF_CLASS: dict[type, HeadBuilder] = {}
_OF_ENDING: dict[str, HeadBuilder] = {}


def register_head(kind: type | str, build: HeadBuilder) -> None:
    """Say what a kind of model predicts, for every trainer of this process.

    Args:
        kind: A class of models, which counts for its subclasses too; or the end of the names of a
            family's classes, as "ForTokenClassification". A class comes before an end of its name,
            a longer end before a shorter one, and what is registered last before what was there.
        build: From a batch with its labels to its head. It takes the labels out of the batch by
            `batch.pop()` and returns, for one class an item, `batch.classes(target)`.

    Raises:
        TypeError: For a kind that is neither.
    """
    if isinstance(kind, type):
        _OF_CLASS[kind] = build
    elif isinstance(kind, str):
        _OF_ENDING[kind] = build
    else:
        raise TypeError(
            f"kind must be a class or the end of a class's name, got {type(kind).__name__}"
        )


def has_registered_class(model: nn.Module) -> bool:
    """Return whether somebody registered a head for a model's class or one that it derives from."""
    return _find_of_class(base_model(model)) is not None


def known_endings() -> tuple[str, ...]:
    """Return the ends of the names of the classes that are known."""
    return tuple(ending for ending, build in _OF_ENDING.items() if not isinstance(build, _OwnLoss))


def find_head(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | None = None,
    unlabelled_index: int | None = None,
    label_names: Sequence[str] | None = None,
) -> Head:
    """Choose the terms of the loss by what is registered for the model's class.

    Args:
        model: An unwrapped Hugging Face model; PEFT may have wrapped it.
        inputs: A batch with its labels; never changed.
        label_smoothing: Smoothing of the NLL's target.
        class_weight: Weight of each class in the NLL.
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
    build = _find_of_class(batch.model) or _find_of_ending(batch.name)
    if build is None:
        known = ", ".join(f"*{ending}" for ending in known_endings())
        raise UnknownHeadError(
            f"model must be one of {known}, got {batch.name}; {WAY_OUT}, and register_head says "
            "it for a class"
        )
    config = getattr(batch.model, "config", None)
    if not getattr(config, "return_dict", True) and not isinstance(build, _OwnLoss):
        # Heads read outputs by name.
        batch.inputs["return_dict"] = True
    return build(batch)


def _find_of_class(model: nn.Module) -> HeadBuilder | None:
    return next((_OF_CLASS[kind] for kind in type(model).__mro__ if kind in _OF_CLASS), None)


def _find_of_ending(name: str) -> HeadBuilder | None:
    fitting = [ending for ending in _OF_ENDING if name.endswith(ending)]
    return _OF_ENDING[max(fitting, key=len)] if fitting else None


@dataclass(frozen=True)
class _OwnLoss:
    """Stands for a head that cannot be built: the classes have another loss than their name says.

    Attributes:
        loss: What it is.
    """

    loss: str

    def __call__(self, batch: LabelledBatch) -> Head:
        raise batch.unknown(f"has a loss of its own, {self.loss}")


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
_HEADS: tuple[tuple[tuple[str, ...], HeadBuilder], ...] = (
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

for _endings, _build in _HEADS:
    for _ending in _endings:
        register_head(_ending, _build)
for _endings, _loss in _OTHER_LOSSES:
    for _ending in _endings:
        register_head(_ending, _OwnLoss(_loss))
