"""A model from what a user can name on the command line."""

import importlib
import os
import sys
from typing import Any

from torch import nn


def load_model(name: str) -> nn.Module:
    """Load a model from a folder or hub id, or by calling `module:callable`.

    A hub model is built from its configuration alone, as its weights do not matter here.

    Raises:
        ValueError: If the callable returns no module, or nothing can be found by the name.
    """
    if ":" in name and not os.path.exists(name):
        return _call(name)
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    for architecture in getattr(config, "architectures", None) or []:
        model_class: Any = getattr(transformers, architecture, None)
        if model_class is not None:
            model: nn.Module = model_class(config)
            return model
    default: nn.Module = transformers.AutoModel.from_config(config)
    return default


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
