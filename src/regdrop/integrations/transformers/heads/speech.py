"""Heads that align what was said with the frames of its sound."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from regdrop.heads import Head
from regdrop.integrations.transformers.heads.batch import LabelledBatch
from regdrop.loss import ItemTerms, ctc_terms
from regdrop.loss.ctc import count_sequences


def transcription(batch: LabelledBatch) -> Head:
    """Letters or words along the frames of a sound, by connectionist temporal classification."""
    labels, config = batch.pop(), batch.model.config
    batch.refuse_options("a class for every frame, which CTC does not know")
    reduction = config.ctc_loss_reduction
    terms = partial(
        _terms_of_frames,
        blank=config.pad_token_id,
        reduction=reduction,
        zero_infinity=config.ctc_zero_infinity,
    )
    # One tensor, so that a part of the rows keeps its numbers of frames.
    target = torch.cat([_count_frames(batch)[:, None], labels], dim=1)
    return Head(batch.inputs, target, terms, count=partial(count_sequences, reduction=reduction))


def _terms_of_frames(logits: Tensor, target: Tensor, /, **options: Any) -> ItemTerms:
    frames = target[:, 0].clamp(max=logits.shape[1])
    return ctc_terms(logits, target[:, 1:], logit_lengths=frames, **options)


def _count_frames(batch: LabelledBatch) -> Tensor:
    """Return the frames of every row's logits, by the model's own rule for its mask."""
    model: Any = batch.model
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        sound = batch.inputs[model.main_input_name]
        mask = torch.ones(sound.shape[:2], dtype=torch.long, device=sound.device)
    names = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")
    for name in names:
        rule = getattr(model, name, None)
        if rule is not None:
            frames: Tensor = rule(mask.sum(-1)).long()
            return frames
    raise batch.unknown(f"does not tell how many frames its logits have: it has none of {names}")
