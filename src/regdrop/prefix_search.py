"""Which part of a model `share_prefix` could compute once, and how much of a forward it is."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regdrop.passes import (
    find_dropout,
    forget_converted_weights,
    preserve_buffers,
    preserve_random_state,
    repeat_batch,
    share_prefix,
    why_not_shared,
)
from regdrop.passes.dropout import rate_attributes

_WORTHWHILE = 0.01


class PrefixSuggestion(NamedTuple):
    """A part of a model that stacked passes could compute once.

    Attributes:
        until: Its name, for `share_prefix`.
        share: Its share of the floating-point operations of a forward.
    """

    until: str
    share: float


def suggest_prefix(model: nn.Module, batches: Iterable[Any]) -> PrefixSuggestion | None:
    """Watch forwards of a model and return the largest part that `share_prefix` could share.

    It is the submodule with the most operations of those that end before the first active dropout
    in every batch; it is tried on the stacked batches. The run is left as it was.

    Args:
        model: A model in training mode, as it will be trained: with BatchNorm frozen or not.
        batches: Some batches: mappings of its keyword arguments, tuples of its arguments, one
            argument, or any of these with a target behind it, as a DataLoader gives them: a list of
            two, or a tuple of two that the model does not take. A list of two that is one argument
            is given as a tuple, `([a, b],)`.

    Returns:
        The part; None if there is none of 1 % of the operations or more, or no active dropout.

    Raises:
        TypeError: If `model` is no module.
        ValueError: If there is no batch.
    """
    sources = find_dropout(model)
    seen = [_without_target(model, batch) for batch in batches]
    if not seen:
        raise ValueError("batches must hold at least one batch, got none")
    if not any(source.active for source in sources):
        return None
    try:
        with torch.no_grad(), preserve_random_state(), preserve_buffers(model):
            shares = [_watch(model, batch) for batch in seen]
            common = {
                name: min(share[name] for share in shares)
                for name in shares[0]
                if all(name in share for share in shares)
            }
            # Of equal parts the outermost is the first.
            for name in sorted(common, key=lambda name: -common[name]):
                if common[name] >= _WORTHWHILE and _can_be_shared(model, name, seen):
                    return PrefixSuggestion(name, common[name])
    finally:
        forget_converted_weights()
    return None


def _without_target(model: nn.Module, batch: Any) -> Any:
    """Return what the model takes of a batch that may be a pair of inputs and target."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return batch
    if isinstance(batch, tuple):
        try:
            inspect.signature(model.forward).bind(*batch)
        except TypeError:
            return batch[0]
        return batch
    return batch[0]


def _watch(model: nn.Module, batch: Any) -> dict[str, float]:
    """Return the share of a forward of each submodule that ends before the first dropout."""
    random = {id(rate.owner) for rate in rate_attributes(model) if rate.source.active}
    operations: dict[str, int] = {}
    started: list[int] = []
    is_random = False
    counter = FlopCounterMode(display=False)

    def start(module: nn.Module, args: Any) -> None:
        nonlocal is_random
        is_random |= id(module) in random
        started.append(counter.get_total_flops())

    def stop(name: str) -> None:
        spent = counter.get_total_flops() - started.pop()
        if is_random:
            operations.pop(name, None)
        else:
            operations[name] = operations.get(name, 0) + spent

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(start))
        hooks.append(
            module.register_forward_hook(lambda module, args, output, name=name: stop(name))
        )
    try:
        with counter:
            _forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    total = counter.get_total_flops()
    order = [name for name, _ in model.named_modules() if operations.get(name)]
    return {name: operations[name] / total for name in order}


def _can_be_shared(model: nn.Module, name: str, batches: list[Any]) -> bool:
    if why_not_shared(model, name) is not None:
        return False
    try:
        with share_prefix(model, name, num_passes=2, check_every=1):
            for batch in batches:
                _forward(model, repeat_batch(batch))
    except ValueError:
        return False
    return True


def _forward(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)
