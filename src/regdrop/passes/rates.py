"""Dropout rates set from outside: one for all passes, or another for each pass."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from regdrop.arguments import check_number
from regdrop.passes.dropout import RateAttribute, rate_attributes
from regdrop.passes.obstacles import uses_gradient_checkpointing
from regdrop.passes.stacking import find_tensors
from regdrop.passes.strategies import running_pass, stacked_rows

_SETTABLE = ("dropout", "attention", "lora")
_CHECKPOINTING = (
    "dropout_rates cannot be used with gradient checkpointing: the recomputation would run with "
    "another pass's rate; switch checkpointing off"
)

_STACKED = (
    "rates must be one number for passes that are stacked in one forward, which has one rate; for "
    "a rate a pass use passes='sequential', got {}"
)


@contextmanager
def dropout_rates(model: nn.Module, rates: float | Sequence[float]) -> Iterator[None]:
    """Run a model with other dropout rates; its own come back on exit.

    Functional dropout takes one rate for a whole forward, so different rates need one forward a
    pass: passes="sequential" in `rdrop_step`. The rate of a forward is in force again while its own
    backward runs; run the backward inside this context. A copy of the model has its own rates again
    from its first forward on.

    Args:
        model: Its sources with a rate above 0 are set: dropout modules, attention and LoRA
            dropout. Those that are off stay off.
        rates: One rate for every forward, or a sequence of one for each pass: pass 0 of
            `rdrop_step` has the first rate in any case. In a loop of your own, the forwards of
            `model` in training mode cycle through them, one a forward, and begin anew after one
            that failed; those without a gradient, which run first there, take the last ones.

    Raises:
        TypeError: If `model` is no module, or a rate no number.
        ValueError: For a rate outside [0, 1), a model without an active rate, or one that uses
            gradient checkpointing, whose recomputation would draw with another pass's rate. In a
            forward of `rdrop_step`, if it is stacked and there are several rates.
    """
    sources = _settable(model)
    is_one = isinstance(rates, str) or not isinstance(rates, Iterable)
    sequence: tuple[Any, ...] = (rates,) if is_one else tuple(rates)  # type: ignore[arg-type]
    for rate in sequence:
        check_number("rates", rate)
    if not sequence or not all(0 <= rate < 1 for rate in sequence):
        raise ValueError(f"rates must be one or more numbers from 0 up to 1, got {rates}")
    if uses_gradient_checkpointing(model):
        raise ValueError(_CHECKPOINTING)
    if not sources:
        raise ValueError("model must have a dropout rate above 0 to be changed, found none")
    state = _RateSwitcher(sources, sequence)
    hooks = [
        model.register_forward_pre_hook(state.before_forward),
        model.register_forward_hook(state.after_forward),
    ]
    if len(sequence) == 1:
        state.set(sequence[0])
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        state.restore()
        if len(sequence) > 1 and not state.calls:
            warnings.warn(
                "dropout_rates changed nothing: no forward of the model itself ran in training "
                "mode; call the module, not a method of it",
                stacklevel=3,
            )


class DropoutOdds:
    """The odds p / (1 - p) of every dropout rate p of a model, multiplied by a factor.

    To second order R-Drop with alpha multiplies dropout's own penalty by 1 + alpha, and that
    penalty is proportional to the odds: this is the same penalty by noise alone.

    Args:
        model: Its sources with a rate above 0 are changed: dropout modules, attention and LoRA.

    Raises:
        ValueError: For a model without an active rate.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sources = _settable(model)
        if not self._sources:
            raise ValueError("model must have a dropout rate above 0 to be changed, found none")

    def scale(self, factor: float) -> None:
        """Make the odds so many times what they were in the beginning.

        Raises:
            ValueError: For a factor that is not above 0.
        """
        if not factor > 0:
            raise ValueError(f"factor must be above 0, got {factor}")
        for found in self._sources:
            if found.source.rate == 1:  # its odds are infinite, and stay so
                continue
            odds = factor * found.source.rate / (1 - found.source.rate)
            setattr(found.owner, found.attribute, odds / (1 + odds))


def scale_dropout_odds(model: nn.Module, factor: float) -> None:
    """Multiply the odds of every dropout rate of a model for good; see `DropoutOdds`."""
    DropoutOdds(model).scale(factor)


def _settable(model: nn.Module) -> list[RateAttribute]:
    return [
        found
        for found in rate_attributes(model)
        if found.source.rate > 0 and found.source.kind in _SETTABLE
    ]


class _RateSwitcher:
    """The rate in force, forward by forward and backward by backward."""

    def __init__(self, sources: list[RateAttribute], sequence: tuple[float, ...]) -> None:
        self.sources = sources
        self.sequence = sequence
        self.calls = 0
        self.rate = sequence[0]
        # The rates that are left of this round through the sequence, in a loop of one's own.
        self.left: list[float] = []
        self.is_running = False
        self.closed = False
        self.is_copy = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has left the context, which knows nothing of it.
        return {**vars(self), "is_copy": True}

    def set(self, rate: float) -> None:
        if not self.closed:
            for found in self.sources:
                setattr(found.owner, found.attribute, rate)

    def restore(self) -> None:
        for found in self.sources:
            setattr(found.owner, found.attribute, found.source.rate)
        self.closed = True

    def before_forward(self, model: nn.Module, args: Any) -> None:
        if self.is_copy and not self.closed:
            self.restore()
        if model.training and not self.closed:
            if len(self.sequence) > 1 and torch._C._current_graph_task_id() != -1:
                raise ValueError(_CHECKPOINTING)  # a recomputation, inside the backward
            self.calls += 1
            if len(self.sequence) > 1 and stacked_rows() is not None:
                raise ValueError(_STACKED.format(list(self.sequence)))
            self.rate = self._next_rate()
            self.set(self.rate)

    def _next_rate(self) -> float:
        number = running_pass()
        if number is not None:
            return self.sequence[number % len(self.sequence)]
        # A forward that still runs has failed, or calls the model again: a round begins anew.
        if self.is_running or not self.left:
            self.left = list(self.sequence)
        self.is_running = True
        return self.left.pop(0 if torch.is_grad_enabled() else -1)

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training and not self.closed:
            self.is_running = False
            for tensor in find_tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad, rate=self.rate: self.set(rate))
