"""Layers of Keras on torch: modules that their model does not list among its own."""

from collections.abc import Iterator

from torch import nn


def is_keras(module: nn.Module) -> bool:
    """Return whether a module is a layer or a model of Keras, which is not imported for that."""
    return any(kind.__module__.split(".")[0] == "keras" for kind in type(module).__mro__)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `model.named_modules()` does, and then the layers that only Keras knows."""
    seen: set[nn.Module] = set()
    yield from model.named_modules(memo=seen)
    for name, module in model.named_modules():
        if is_keras(module) and hasattr(module, "_flatten_layers"):
            for layer in module._flatten_layers(include_self=False):
                prefix = f"{name}.{layer.name}".strip(".")
                yield from layer.named_modules(memo=seen, prefix=prefix)
