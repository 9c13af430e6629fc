"""Heads that choose among the words of a vocabulary: masked, next, or generated ones."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from regdrop.arguments import IGNORE_INDEX
from regdrop.heads import Head
from regdrop.integrations.transformers.heads.batch import LabelledBatch

# The other kinds of PEFT's prompts add learned positions to the decoder too.
_ENCODER_PROMPTS = frozenset({"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"})


def aligned(batch: LabelledBatch) -> Head:
    """The word at every position that has a label: behind masks, or moved by the caller."""
    return _words(batch, batch.pop())


def causal(batch: LabelledBatch) -> Head:
    """The next token: the labels move by one, and the last position counts no more."""
    if batch.prompt is not None and batch.prompt.peft_type == "CPT":
        raise batch.unknown("is tuned by PEFT's CPT, which has a loss of its own")
    return _words(batch, batch.pop_next_words())


def generation(batch: LabelledBatch) -> Head:
    """An encoder-decoder: the decoder reads the labels moved right, and predicts them."""
    config = batch.model.config
    if not config.is_encoder_decoder:
        return causal(batch)
    labels, inputs = batch.pop(), batch.inputs
    if inputs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        raise batch.unknown(
            "adds losses of its experts that its output does not show without labels: "
            "output_router_logits=False leaves them out"
        )
    if batch.prompt is not None and batch.prompt.peft_type not in _ENCODER_PROMPTS:
        raise batch.unknown(
            f"is tuned by PEFT's {batch.prompt.peft_type}, which shifts the labels itself"
        )
    if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
        # Without labels the model would read its own input.
        words = _decoder_words(batch, labels)
        inputs["decoder_input_ids"] = words
        if batch.name == "EncoderDecoderModel" and "decoder_attention_mask" not in inputs:
            inputs["decoder_attention_mask"] = (words != config.pad_token_id).long()
    if batch.prompt is None and "use_cache" in batch.parameters:
        # As the models do that are given labels; some of the others look ahead.
        inputs.setdefault("use_cache", False)
    return _words(batch, labels)


def _decoder_words(batch: LabelledBatch, labels: Tensor) -> Tensor:
    """Return what the decoder reads: the labels moved right by one, as the model moves them."""
    # Some models write into what they are given.
    labels = labels.clone()
    prepare = getattr(batch.model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        prepared: Tensor = prepare(labels=labels)
        return prepared
    start = _token_id(batch, "decoder_start_token_id")
    padding = _token_id(batch, "pad_token_id")
    words = F.pad(labels[..., :-1], (1, 0), value=start)
    return words.masked_fill(words == IGNORE_INDEX, padding)


def _token_id(batch: LabelledBatch, name: str) -> int:
    """Return a token's index from the first config that has it."""
    model = batch.model
    configs = [model.config, model.config.get_text_config()]
    for config in (*configs, getattr(model, "generation_config", None)):
        found: int | None = getattr(config, name, None)
        if found is not None:
            return found
    raise ValueError(
        f"config.{name} of {batch.name} must be set, got None: the decoder reads the labels moved "
        "right by one; or give decoder_input_ids in the batch"
    )


def _words(batch: LabelledBatch, target: Tensor) -> Head:
    config: Any = batch.model.config.get_text_config()
    # Translation by two vocabularies has one of its own for what it writes.
    size: int = getattr(config, "tgt_vocab_size", None) or config.vocab_size
    return replace(batch.classes(target, size), vocabulary=size)
