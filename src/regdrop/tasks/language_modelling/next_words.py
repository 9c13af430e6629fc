"""What a class of models makes of next words: how it takes labels, and whether it looks ahead."""

from typing import Any

import torch
from torch import nn

from regdrop.integrations.transformers.heads.registry import find_head

# Far above rounding, and far below what a word that is seen changes in a new model.
_ROUNDING = 1e-5


def takes_moved_labels(model: nn.Module) -> bool:
    """Return whether a model compares each position with its own label, and so needs them moved.

    Most models move the labels themselves. The decoders of encoder-decoders leave it to the caller,
    and would learn to copy.

    Raises:
        UnknownHeadError: For a class whose loss is not that of the next word.
    """
    words = torch.arange(3)[None]
    head = find_head(model, {"input_ids": words, "labels": words.clone()})
    return torch.equal(head.target, words)


def check_causal(model: Any, length: int) -> None:
    """Check on a few words that a model predicts each from those before it alone.

    Args:
        model: A model of words, as it was made or loaded.
        length: Most words that it may read.

    Raises:
        ValueError: If it sees words to come, or cannot read any.
    """
    size = model.config.vocab_size
    words = torch.arange(min(8, length), device=model.device)[None] % size
    changed = words.clone()
    half = words.shape[1] // 2
    changed[:, half:] = (words[:, half:] + 1) % size
    was_training = model.training
    model.eval()
    try:
        # What a model draws is drawn alike, and apart from the weights and masks of the run.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = []
            for each in (words, changed):
                torch.manual_seed(0)
                logits.append(model(input_ids=each, use_cache=False).logits[:, :half].float())
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot read blocks of words, which have no padding word: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    finally:
        model.train(was_training)
    before, after = logits
    difference = (before - after).abs().max()
    if difference > _ROUNDING * before.abs().max():
        raise ValueError(
            f"{type(model).__name__} sees the words that it is to predict: a language model must "
            "read those before alone (for an encoder's class, model_config.is_decoder=true)"
        )
