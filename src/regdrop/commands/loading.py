"""A model from what a user can name on the command line, and batches to try it on."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from regdrop.integrations import extra
from regdrop.integrations.transformers import loading


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
    return loading.load_model(name)


def made_up_batches(model: nn.Module) -> list[Any]:
    """Return two small batches of a model of transformers or timm; for others none."""
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        return list(loading.made_up_batches(model))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *size, generator=generator) for _ in range(2)]
