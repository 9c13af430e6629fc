"""The tensors that a model's output holds: its loss, its logits, any by name or position."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

# A name, a position, or None for an output that is a tensor itself.
Key = str | int | None


def named_tensors(output: Any) -> Iterator[tuple[Key, Tensor]]:
    """Yield the tensors of a model's output with their names or positions."""
    yield from ((key, value) for key, value in _items(output) if isinstance(value, Tensor))


def find_tensor(output: Any, key: Key) -> Tensor:
    """Return the tensor of a model's output at a name or position.

    Raises:
        ValueError: If the output has none there.
    """
    tensors = dict(named_tensors(output))
    if key not in tensors:
        raise ValueError(f"the model's output must hold a tensor {key!r}, got {list(tensors)}")
    return tensors[key]


def find_loss(output: Any) -> Tensor | None:
    """Return the loss as the Trainer finds it: by name, else the first of several."""
    loss: Any = getattr(output, "loss", None)
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, (tuple, list)):
        loss = output[0] if output else None
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return None
    return loss.detach().flatten()[0]


def find_logits(output: Any, rows: int) -> tuple[Key, Tensor]:
    """Return the logits of an output: by name, else the only numbers with a row an item.

    Raises:
        ValueError: If there are none, or several of which none is called logits.
    """
    tensors = dict(named_tensors(output))
    fitting = [
        key
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dim() > 0 and len(tensor) == rows
    ]
    named = [key for key in fitting if isinstance(key, str) and "logits" in key]
    if "logits" in tensors:
        named = ["logits"]
    if named or len(fitting) == 1:
        key = (named or fitting)[0]
        return key, tensors[key]
    found = {key: _say(value) for key, value in _items(output) if _holds_tensors(value)}
    reason = "one of them must be called logits" if fitting else "return them beside the loss"
    inside = [key for key in found if key not in tensors]
    if inside and not fitting:
        reason = f"return one tensor of {inside[0]!r} as logits"
    raise ValueError(
        f"the model's output must hold logits of {rows} rows to be compared between passes, got "
        f"{found}: {reason}, or override rdrop_head of the trainer"
    )


def _items(output: Any) -> Iterator[tuple[Any, Any]]:
    """Return what an output holds, with names or positions."""
    if isinstance(output, Mapping):
        return iter(output.items())
    if isinstance(output, (tuple, list)):
        return iter(enumerate(output))
    if isinstance(output, Tensor):
        return iter([(None, output)])
    if is_dataclass(output):
        return ((field.name, getattr(output, field.name)) for field in fields(output))
    return iter(())


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or any(True for _ in named_tensors(value))


def _say(value: Any) -> tuple[int, ...] | str:
    """Return the shape of a tensor, or in words those of the tensors that something holds."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    shapes = [tuple(tensor.shape) for _, tensor in named_tensors(value)]
    return f"{type(value).__name__} of {', '.join(map(str, shapes))}"
