"""A model from what a user can name on the command line, and batches to try it on."""

import importlib
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn


def load_model(name: str) -> nn.Module:
    """Load a model from a folder or hub id, or by calling `module:callable`.

    A hub model is built from its configuration alone, as its weights do not matter here.

    Raises:
        ValueError: If the callable returns no module, or nothing can be found by the name.
    """
    if ":" in name and not os.path.exists(name):
        return _call(name)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        for architecture in getattr(config, "architectures", None) or []:
            model_class: Any = getattr(transformers, architecture, None)
            if model_class is not None:
                model: nn.Module = model_class(config)
                return model
        default: nn.Module = transformers.AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        what = "a folder here" if os.path.isdir(name) else "no folder here"
        raise ValueError(f"model {name!r} is {what} and cannot be loaded: {error}") from error
    return default


def made_up_batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return two small batches of a Hugging Face model for words or images; for others none."""
    config, kind = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if kind == "input_ids":
        # The library's own, which hold the special tokens that some heads look for.
        words: dict[str, Tensor] = dict(getattr(model, "dummy_inputs", {}))
        return [words, {name: value[:2] for name, value in words.items()}] if words else []
    if kind == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, getattr(config, "num_channels", 3), height, width)
        generator = torch.Generator().manual_seed(0)
        return [{kind: torch.randn(shape, generator=generator)} for _ in range(2)]
    return []


def _call(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {name!r} cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)
    model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model
