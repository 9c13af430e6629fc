"""Checkpoints: those whose parameters have other names than the model's, and means of several.

Since version 5, `save_pretrained` writes the names of the hub where a model class has renamed its
parameters (ViT and mixtures of experts among them). `from_pretrained` translates them back; the
Trainer (as of 5.23) loads by name, and leaves the renamed parameters as they are:
https://github.com/huggingface/transformers/issues/48805
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def load_renamed_weights(model: nn.Module, checkpoint: str | Path) -> bool:
    """Load a checkpoint by `from_pretrained` if its names are not the model's.

    Args:
        model: Takes the weights over in place, so that an optimiser keeps its parameters.
        checkpoint: Folder that the Trainer wrote.

    Returns:
        Whether it was loaded; False where loading by name is right.
    """
    if not isinstance(model, PreTrainedModel) or _saved_names(Path(checkpoint)) <= set(
        model.state_dict()
    ):
        return False
    loaded = type(model).from_pretrained(checkpoint, config=model.config, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
    return True


def average_weights(model: PreTrainedModel, checkpoints: Sequence[str | Path]) -> None:
    """Give a model the mean weights of several of its checkpoints.

    Args:
        model: Takes the weights over in place.
        checkpoints: Folders that the Trainer wrote.

    Raises:
        ValueError: If there is none.
    """
    if not checkpoints:
        raise ValueError("checkpoints must hold at least one folder, got none")
    mean: dict[str, torch.Tensor] = {}
    for checkpoint in checkpoints:
        loaded = type(model).from_pretrained(checkpoint, config=model.config, dtype=model.dtype)
        for name, value in loaded.state_dict().items():
            # Counters (whole numbers) are taken from the last checkpoint.
            is_summed = value.is_floating_point() and name in mean
            mean[name] = mean[name] + value.double() if is_summed else _wide(value)
    count = len(checkpoints)
    model.load_state_dict(
        {name: v / count if v.is_floating_point() else v for name, v in mean.items()}
    )


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def _saved_names(checkpoint: Path) -> set[str]:
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    weights = checkpoint / SAFE_WEIGHTS_NAME
    if not weights.exists():
        return set()
    with safe_open(weights, framework="pt") as file:
        return set(file.keys())
