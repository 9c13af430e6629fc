"""A batch with labels for each of the small models of `tiny_models`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tiny_models import END, IMAGE, LABELS, LENGTH

Batch = dict[str, Tensor]

# Ordinary words, between the special tokens.
FIRST_WORD, LAST_WORD = 5, 80
ANSWER, SAMPLES, FRAMES, CHARACTERS = 6, 3200, 80, 30
_INNER = ("audio_config", "encoder_config", "vision_config", "encoder")


class Draw:
    """Random inputs of a seed of their own."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._generator = torch.Generator().manual_seed(1)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (self.rows, *shape), generator=self._generator)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(self.rows, *shape, generator=self._generator)

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(self.rows, *shape, dtype=torch.long)

    def words(self, *shape: int) -> Tensor:
        """Return words whose last one ends the text."""
        words = self.integers(FIRST_WORD, LAST_WORD, *shape)
        words[..., -1] = END
        return words


def tiny_batch(model: PreTrainedModel, class_name: str, rows: int = 4) -> Batch:
    """Return a batch with its labels, some of them ignored where the library ignores some."""
    draw = Draw(rows)
    special = _INPUTS.get(class_name)
    inputs = _inputs(model, class_name, draw) if special is None else special(model.config, draw)
    if class_name.endswith("ForCTC"):
        length = inputs[model.main_input_name].shape[1]
        inputs["attention_mask"] = draw.ones(length)
        inputs["attention_mask"][1, -length // 4 :] = 0  # a shorter sound
    return {**inputs, **_labels(model, class_name, draw, inputs)}


def _inputs(model: PreTrainedModel, class_name: str, draw: Draw) -> Batch:
    config, main = model.config, model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    if class_name.endswith("MultipleChoice"):
        return {"input_ids": draw.words(LABELS, LENGTH)}
    if class_name.endswith("VideoClassification"):
        size = _entry(config, "image_size", "crop_size")
        frames = _entry(config, "num_frames", "frames_per_clip")
        name = "pixel_values_videos" if "pixel_values_videos" in accepted else "pixel_values"
        return {name: draw.noise(frames, 3, size, size)}
    if main == "pixel_values" or (main not in accepted and "pixel_values" in accepted):
        size, channels = _entry(config, "image_size"), _entry(config, "num_channels", "in_channels")
        return {"pixel_values": draw.noise(channels or 3, size or IMAGE, size or IMAGE)}
    if main == "input_values":
        return {"input_values": draw.noise(SAMPLES)}
    if main == "input_features":
        names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel")
        return {"input_features": draw.noise(FRAMES, _entry(config, *names, "n_mel_bins"))}
    if main == "inputs":
        return {"inputs": draw.words(LENGTH)}
    words = {"input_ids": draw.words(LENGTH)}
    return words | ({"attention_mask": draw.ones(LENGTH)} if "attention_mask" in accepted else {})


def _entry(config: Any, *names: str) -> Any:
    """Return the first entry that a config or one inside it has."""
    for holder in (config, *(getattr(config, inner, None) for inner in _INNER)):
        for name in names:
            value = getattr(holder, name, None)
            if value is not None:
                return value if isinstance(value, int) else value[0]
    return None


def _labels(model: PreTrainedModel, class_name: str, draw: Draw, inputs: Batch) -> Batch:
    if class_name.endswith(("QuestionAnswering", "QuestionAnsweringSimple")):
        ends = ("start_positions", "end_positions")
        return {name: draw.integers(0, LENGTH) for name in ends}
    if class_name.endswith("SemanticSegmentation"):
        labels = draw.integers(0, LABELS, IMAGE, IMAGE)
        labels[0, :7] = 255
    elif class_name.endswith("FrameClassification"):
        frames = model(**inputs).logits.shape[1]
        labels = F.one_hot(draw.integers(0, LABELS, frames), LABELS)
    elif class_name.endswith("NextSentencePrediction"):
        labels = draw.integers(0, 2)
    elif class_name.endswith("TokenClassification"):
        labels = draw.integers(0, LABELS, LENGTH)
        labels[0, :3] = -100
    elif class_name.endswith(("Classification", "MultipleChoice")):
        labels = draw.integers(0, LABELS)
    elif class_name.endswith("CTC"):
        labels = draw.integers(FIRST_WORD, CHARACTERS, 3)
        labels[0, 2:] = -100
    else:
        labels = draw.words(ANSWER if model.config.is_encoder_decoder else LENGTH)
        labels[0, 4:] = -100
    return {"labels": labels}


def _boxes(config: Any, draw: Draw) -> Batch:
    corners = draw.integers(0, 30, LENGTH, 4) / 30
    return {"input_ids": draw.words(LENGTH), "bbox": corners}


def _picture_and_words(config: Any, draw: Draw) -> Batch:
    return {"pixel_values": draw.noise(3, IMAGE, IMAGE), "input_ids": draw.words(LENGTH)}


def _words_alone(config: Any, draw: Draw) -> Batch:
    return {"input_ids": draw.words(LENGTH), "attention_mask": draw.ones(LENGTH)}


def _words_of_two_texts(config: Any, draw: Draw) -> Batch:
    words = draw.words(LENGTH)
    words[:, 2:4] = END
    return {"input_ids": words}


def _choices_of_two_texts(config: Any, draw: Draw) -> Batch:
    words = draw.words(LABELS, LENGTH)
    words[..., 2:4] = END
    return {"input_ids": words}


def _mel(config: Any, draw: Draw) -> Batch:
    return {"input_features": draw.noise(config.num_mel_bins, 2 * config.max_source_positions)}


_INPUTS: dict[str, Callable[[Any, Draw], Batch]] = {
    "ASTForAudioClassification": lambda config, draw: {
        "input_values": draw.noise(config.max_length, config.num_mel_bins)
    },
    "BlipForConditionalGeneration": _picture_and_words,
    "BlipForQuestionAnswering": _picture_and_words,
    # Without a cache: that of these models does not fit their config.
    "BltForCausalLM": lambda config, draw: {"input_ids": draw.words(LENGTH), "use_cache": False},
    "BrosForTokenClassification": lambda config, draw: {
        "input_ids": draw.words(LENGTH),
        "bbox": draw.noise(LENGTH, 8),
    },
    "FSMTForConditionalGeneration": lambda config, draw: {
        "input_ids": draw.words(LENGTH),
        "decoder_input_ids": draw.words(ANSWER),
    },
    "GitForCausalLM": _picture_and_words,
    "GraniteSpeech5ForCTC": lambda config, draw: {
        "input_features": draw.noise(FRAMES, 4 * config.encoder_config.num_mel_bins)
    },
    "IdeficsForVisionText2Text": lambda config, draw: {
        **_words_alone(config, draw),
        "pixel_values": draw.noise(1, 3, IMAGE, IMAGE),
        "image_attention_mask": draw.ones(LENGTH, 1),
    },
    "LongformerForMultipleChoice": _choices_of_two_texts,
    "LongformerForQuestionAnswering": _words_of_two_texts,
    "Molmo2ForConditionalGeneration": lambda config, draw: {
        **_words_alone(config, draw),
        "mm_token_type_ids": 0 * draw.ones(LENGTH),
    },
    "PPFormulaNetForConditionalGeneration": lambda config, draw: {
        "pixel_values": draw.noise(3, IMAGE, IMAGE),
        "decoder_input_ids": draw.words(ANSWER),
    },
    "PaliGemmaForConditionalGeneration": lambda config, draw: {
        **_words_alone(config, draw),
        "token_type_ids": draw.ones(LENGTH),
    },
    # The first two of a patch are its row and its column.
    "Pix2StructForConditionalGeneration": lambda config, draw: {
        "flattened_patches": torch.cat(
            [
                draw.integers(0, 4, 9, 2).float(),
                draw.noise(9, config.vision_config.patch_embed_hidden_size),
            ],
            dim=-1,
        )
    },
    "ShieldGemma2ForImageClassification": _words_alone,
    "Siglip2ForImageClassification": lambda config, draw: {
        "pixel_values": draw.noise(16, 3 * config.vision_config.patch_size**2),
        "pixel_attention_mask": draw.ones(16),
        "spatial_shapes": 4 * draw.ones(2),
    },
    "SpeechEncoderDecoderModel": lambda config, draw: {"input_values": draw.noise(SAMPLES)},
    "UdopForConditionalGeneration": _boxes,
    "ViltForQuestionAnswering": _picture_and_words,
    "VisionEncoderDecoderModel": lambda config, draw: {"pixel_values": draw.noise(3, IMAGE, IMAGE)},
    "WhisperForAudioClassification": _mel,
    "WhisperForConditionalGeneration": _mel,
    "xLSTMForCausalLM": lambda config, draw: {"input_ids": draw.words(LENGTH), "use_cache": False},
}
