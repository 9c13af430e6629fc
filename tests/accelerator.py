"""An accelerator that needs no hardware: its tensors are computed by the CPU, but are none of its.

An operation on tensors of both devices is an error, as it is on a GPU, so that a test on a CPU
finds a tensor that was left behind. By name it is the "meta" device, the only one that every build
of torch can guard; its tensors hold numbers here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
_CPU = torch.device("cpu")
# These take a tensor of the CPU, as CUDA's do: numbers to copy, places to read or write.
_MIXING = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}
# These take not even a single number of it.
_STRICT = {"aten::isclose", "aten::equal", "aten::cat", "aten::stack"}


class AwayTensor(Tensor):
    """A tensor of the accelerator; `held` is its values, a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "AwayTensor":
        away = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            dtype=held.dtype,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            device=DEVICE,
        )
        away.held = held
        return away

    def __repr__(self, **_: Any) -> str:
        return f"AwayTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU and give its result the device that it would have."""
    name = func._schema.name
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    away = [x for x in tensors if isinstance(x, AwayTensor)]
    here = [x for x in tensors if not isinstance(x, AwayTensor)]
    if away and name not in _MIXING and any(x.dim() or name in _STRICT for x in here):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found two")
    goes_away, device = bool(away), kwargs.get("device")
    if device is not None:
        goes_away = torch.device(device).type == DEVICE.type
        kwargs = {**kwargs, "device": _CPU}
    first = func._schema.arguments[0] if func._schema.arguments else None
    is_written = first is not None and first.alias_info is not None and first.alias_info.is_write
    held_args, held_kwargs = tree_map_only(AwayTensor, lambda x: x.held, (args, kwargs))
    result = func(*held_args, **held_kwargs)
    if is_written and name.endswith("_"):
        return args[0]
    if not goes_away:
        return result
    known = {id(x.held): x for x in away}
    return tree_map_only(
        Tensor, lambda x: known[id(x)] if id(x) in known else AwayTensor(x), result
    )


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Conversions(TorchFunctionMode):
    """What does not pass through an operation: new tensors of numbers, and their numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], AwayTensor):
            if func is Tensor.numpy:
                raise TypeError("can't convert a tensor of the accelerator to numpy")
            return args[0].held.tolist()
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == DEVICE.type:
                return func(*args, **{**kwargs, "device": _CPU}).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def accelerator() -> Iterator[torch.device]:
    """Make the accelerator be there, for tensors by its name and for the Trainer by default."""
    state: dict[str, Any] = PartialState()._shared_state
    own = state["device"]
    state["device"] = DEVICE
    try:
        with _Conversions(), _Operations():
            yield DEVICE
    finally:
        state["device"] = own
