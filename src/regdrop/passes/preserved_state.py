"""What an extra forward would change in a run, kept: random states, a model's buffers and modes.

Only what autocast keeps of a forward without a gradient is forgotten.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

# Devices whose generators torch can fork.
_FORKED = ("cuda", "xpu")


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Put the random states of torch, Python and NumPy back on exit."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    python_state = random.getstate()
    numpy_state = None if numpy_random is None else numpy_random.get_state(legacy=False)
    # An Apple device has one generator, which torch's own fork does not know.
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with ExitStack() as forks:
            forks.enter_context(torch.random.fork_rng(devices=()))
            for kind in _FORKED:
                module = getattr(torch, kind)
                if module.is_available():
                    devices = range(module.device_count())
                    forks.enter_context(torch.random.fork_rng(devices, device_type=kind))
            yield
    finally:
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Put a model's buffers and their values back on exit, BatchNorm statistics among them.

    Tensors without values, on the meta device, have only their shapes put back.

    Raises:
        ValueError: For a lazy module that has seen no batch, whose buffers have no shape yet.
    """
    lazy = [name for name, buffer in model.named_buffers() if is_lazy(buffer)]
    if lazy:
        raise ValueError(
            f"the buffer {lazy[0]} has no shape before the first forward, which would be one that "
            "is only measured: run one forward of a batch first"
        )
    kept = [
        (module, name, buffer, None if buffer is None else (buffer.clone(), _version(buffer)))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, state in kept:
                module._buffers[name] = buffer
                # A graph may hold the buffer: what did not change is not written to.
                if buffer is None or state is None or _is_unchanged(buffer, *state):
                    continue
                value, _ = state
                if buffer.shape != value.shape and value.layout == torch.strided:
                    # Observers of quantisation make room for the channels that they see.
                    buffer.resize_(value.shape)
                buffer.copy_(value)


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Put the modes of a model's modules, training or evaluation, back on exit."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        model.train(modes[model])  # what a model does of its own when it changes its mode
        for module, mode in modes.items():
            module.training = mode


def forget_converted_weights() -> None:
    """Let autocast convert a model's weights anew, after a forward without a gradient.

    That of older torch would go on with what it converted there, and the weights would get no
    gradient.
    """
    if not torch.compiler.is_compiling():  # which keeps none
        torch.clear_autocast_cache()


def train_without_statistics(model: nn.Module) -> None:
    """Switch all modules to training but those with running statistics, which stay as they are."""
    model.train()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.training = False


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_unchanged(buffer: Tensor, value: Tensor, version: int | None) -> bool:
    """Return whether a buffer holds what it did; nan is the same as nan.

    Args:
        buffer: The buffer.
        value: Its copy from before.
        version: Its version from before.
    """
    if value.is_meta or isinstance(value, FakeTensor):  # no values
        return buffer.shape == value.shape
    if value.is_nested or value.layout != torch.strided:  # no comparison
        return _version(buffer) == version
    if hasattr(value, "to_local"):  # the parts of a DTensor, without asking other processes
        buffer, value = buffer.to_local(), value.to_local()  # type: ignore[attr-defined]
    if torch.equal(buffer, value):
        return True
    if buffer.shape != value.shape or not (value.is_floating_point() or value.is_complex()):
        return False
    return bool(((buffer == value) | (buffer.isnan() & value.isnan())).all())
