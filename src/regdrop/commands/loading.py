"""A model from what a user can name on the command line, and batches to try it on."""

import importlib
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.integrations import extra


def load_model(name: str) -> nn.Module:
    """Load a model for a look at it.

    Args:
        name: A saved model's folder (of transformers or sentence-transformers), a hub id, a name
            of timm, or `module:callable`, which may return the module of any framework.

    Raises:
        ValueError: If the callable returns no module, or nothing can be found by the name.
        ModuleNotFoundError: If the folder needs a framework that is not installed.
    """
    if os.path.exists(os.path.join(name, "modules.json")):
        with extra("sentence-transformers"):
            from sentence_transformers import SentenceTransformer
        embedder: nn.Module = SentenceTransformer(name, device="cpu")
        return embedder
    is_plain = not os.path.exists(name) and not set(name) & set(":/\\")
    if is_plain and find_spec("timm") is not None:
        import timm

        if timm.is_model(name):
            images: nn.Module = timm.create_model(name)
            return images
    if ":" in name and not os.path.exists(name):
        return _call(name)
    return _build_of_transformers(name)


def made_up_batches(model: nn.Module) -> list[Any]:
    """Return two small batches of a model of transformers or timm; for others none."""
    timm_size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if timm_size is not None:
        return _random_images(timm_size)
    config, kind = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if kind == "input_ids":
        # The library's own, which hold the special tokens that some heads look for.
        words: dict[str, Tensor] = dict(getattr(model, "dummy_inputs", {}))
        return [words, {name: value[:2] for name, value in words.items()}] if words else []
    if kind == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        shape = (getattr(config, "num_channels", 3), height, width)
        return [{kind: images} for images in _random_images(shape)]
    return []


def _call(name: str) -> nn.Module:
    """Return what `module:callable` returns, of a module here or an installed one."""
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {name!r} cannot be imported: {error}") from error
    finally:
        # Not the first: the module may have put its own before it.
        with suppress(ValueError):
            sys.path.remove(here)
    model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _build_of_transformers(name: str) -> nn.Module:
    """Build a model from its configuration alone, as its weights do not matter here."""
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


def _random_images(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *shape, generator=generator) for _ in range(2)]
