"""Alpha that nobody has to search: rules that raise it in the run.

A rule is a function from the state of alpha and what an evaluation observed to the new state. It
reads nothing else, so that a run that goes on from a checkpoint follows the same alphas.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regdrop.alpha_options import AlphaRule, auto_range
from regdrop.arguments import check_integer, check_number
from regdrop.config import RDropConfig

# By how much an evaluation may change alpha.
_FACTOR = 2.0


@dataclass(frozen=True)
class AlphaState:
    """Where alpha is and what its rule remembers.

    Attributes:
        alpha: Alpha at step `since`.
        slope: How much it rises with each step from there.
        since: Step from which it rises.
        best: Lowest validation loss; None before the first.
        previous: Validation loss of the evaluation before.
        kl: Divergence in training when the validation loss was lowest.
        stalls: Evaluations without progress since the lowest one, or since alpha was changed.
        patience: Evaluations without progress that are waited out before alpha is raised.
        was_raised: Whether the evaluation before raised alpha.
    """

    alpha: float
    slope: float = 0.0
    since: int = 0
    best: float | None = None
    previous: float | None = None
    kl: float | None = None
    stalls: int = 0
    patience: int = 0
    was_raised: bool = False


class Observation(NamedTuple):
    """What an evaluation knows.

    Attributes:
        step: The step that comes next, counted from 0.
        loss: Validation loss.
        nll: Mean NLL in training since the evaluation before; None if it is not known.
        kl: Mean divergence in training since then; None if none was measured.
        alpha_max: The most that alpha may be.
        alpha_min: Where it begins, and the least that it steps back to.
        slope: That of a ramp from 0 to `alpha_max` over the whole run.
    """

    step: int
    loss: float
    nll: float | None
    kl: float | None
    alpha_max: float
    alpha_min: float
    slope: float

    def is_progress(self, state: AlphaState) -> bool:
        """Return whether the validation loss is the lowest so far."""
        return state.best is None or self.loss < state.best


Rule = Callable[[AlphaState, Observation], AlphaState]


def _ramp(state: AlphaState, seen: Observation) -> AlphaState:
    return state


def _stall(state: AlphaState, seen: Observation) -> AlphaState:
    """Double alpha without progress; step back, and wait longer, where that made it worse."""
    if seen.is_progress(state):
        return replace(state, stalls=0, was_raised=False)
    if state.was_raised and state.previous is not None and seen.loss > state.previous:
        alpha = max(seen.alpha_min, state.alpha / _FACTOR)
        return replace(state, alpha=alpha, stalls=0, patience=state.patience + 1, was_raised=False)
    stalls = state.stalls + 1
    if stalls <= state.patience or state.alpha >= seen.alpha_max:
        return replace(state, stalls=stalls, was_raised=False)
    alpha = min(seen.alpha_max, state.alpha * _FACTOR)
    return replace(state, alpha=alpha, stalls=0, was_raised=True)


def _kl_target(state: AlphaState, seen: Observation) -> AlphaState:
    """Hold the divergence, without progress, where it was when the validation loss was lowest."""
    if seen.kl is None:
        return state
    if seen.is_progress(state):
        return replace(state, kl=seen.kl)
    if not state.kl:
        return state
    change = min(_FACTOR, max(1 / _FACTOR, seen.kl / state.kl))
    return replace(state, alpha=_between(state.alpha * change, seen.alpha_min, seen.alpha_max))


def _gap(state: AlphaState, seen: Observation) -> AlphaState:
    """Make alpha proportional to the gap of validation to training, `alpha_max` at one nat."""
    if seen.nll is None:
        return state
    return replace(
        state, alpha=_between(seen.alpha_max * (seen.loss - seen.nll), 0.0, seen.alpha_max)
    )


def _ramp_from_stall(state: AlphaState, seen: Observation) -> AlphaState:
    """Begin the ramp at the first evaluation without progress: a late one leaves it a low end."""
    if state.slope or seen.is_progress(state):
        return state
    return replace(state, slope=seen.slope, since=seen.step)


def _check_figure(name: str, value: Tensor | float | None) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a scalar, got shape {tuple(value.shape)}")
    elif value is not None:
        check_number(name, value)


def _between(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))


# "ramp": linear from alpha_start to alpha_max over the run. The others act at evaluations, and
# begin at alpha_min.
RULES: Mapping[AlphaRule, Rule] = {
    "ramp": _ramp,
    "stall": _stall,
    "restore": _stall,  # whoever trains also goes back to the best weights: `should_restore`
    "kl-target": _kl_target,
    "gap": _gap,
    "ramp-from-stall": _ramp_from_stall,
}


class AlphaController:
    """Alpha of every step of a run, by a rule, for a training loop of your own.

    `from_config` builds the one that a config with alpha="auto" stands for.

    With "ramp" it needs no validation. The other rules change alpha where a validation loss is
    given, and stay where they begin without one.

    Args:
        total_steps: Optimiser steps of the whole run.
        rule: One of `RULES`.
        alpha_max: The most that alpha may be; the end of the "ramp". None: as in `RDropConfig`.
        alpha_start: Where the "ramp" begins. None: as in `RDropConfig`.
        alpha_min: Where the other rules begin, and the least that they step back to ("gap" goes
            down to 0). A higher one gives way to `alpha_max`.
        start_step: First step with R-Drop, as in `RDropConfig`; alpha is 0 before it, and
            evaluations before it raise nothing.

    Raises:
        TypeError: If a number of steps is no integer, or another no number.
        ValueError: For a number out of range, or an unknown rule.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        rule: AlphaRule = "ramp",
        alpha_max: float | None = None,
        alpha_start: float | None = None,
        alpha_min: float = 1.0,
        start_step: int = 0,
    ) -> None:
        check_integer("total_steps", total_steps, low=1)
        check_integer("start_step", start_step, low=0)
        if alpha_max is not None:
            check_number("alpha_max", alpha_max, above=0)
        check_number("alpha_min", alpha_min, above=0)
        if alpha_start is not None:
            check_number("alpha_start", alpha_start)
        if not isinstance(rule, str) or rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
        begin, highest = auto_range(rule, alpha_start, alpha_max)
        if not 0 <= (alpha_start or 0.0) <= highest:
            raise ValueError(
                f"alpha_start must be from 0 to alpha_max={highest}, got {alpha_start}"
            )
        if alpha_start and rule != "ramp":
            raise ValueError(
                f"alpha_start={alpha_start} needs rule='ramp', got {rule!r}, which begins at "
                "alpha_min"
            )
        # Numbers of NumPy are none that JSON can hold, as `state_dict` promises.
        self.total_steps, self.start_step = int(total_steps), int(start_step)
        self.alpha_max, self.alpha_min = float(highest), float(min(alpha_min, highest))
        self.alpha_start, self._ramp = float(begin), auto_range("ramp", alpha_start, alpha_max)
        self.rule: AlphaRule = rule
        self.should_restore = False
        self._next_step = 0
        self._sums: dict[str, Tensor | float] = {}
        self._state = AlphaState(self.alpha_min)
        if rule == "ramp":
            self.follow_ramp()

    @classmethod
    def from_config(cls, config: RDropConfig, total_steps: int) -> "AlphaController":
        """Build the controller of a config's rule, its bounds and `start_step`.

        Args:
            config: The options, with alpha="auto".
            total_steps: Optimiser steps of the whole run.

        Raises:
            TypeError: If `config` is no RDropConfig, or `total_steps` no integer.
            ValueError: If its alpha is a number, which nothing changes.
        """
        if not isinstance(config, RDropConfig):
            raise TypeError(f"config must be an RDropConfig, got {type(config).__name__}")
        if config.alpha != "auto":
            raise ValueError(f"config must have alpha='auto', got alpha={config.alpha}")
        return cls(
            total_steps,
            rule=config.alpha_rule,
            alpha_max=config.alpha_max,
            alpha_start=config.alpha_start,
            alpha_min=config.alpha_min,
            start_step=config.start_step,
        )

    @property
    def alpha(self) -> float:
        """Alpha of the step that comes next."""
        return self.alpha_at(self._next_step)

    def alpha_at(self, step: int) -> float:
        """Return alpha of a step, counted from 0, as far as evaluations so far tell."""
        if step < self.start_step:
            return 0.0
        state = self._state
        return min(self.alpha_max, state.alpha + state.slope * max(0, step - state.since))

    def follow_ramp(self) -> None:
        """Follow the "ramp" from now on, as where a run turns out to have no validation loss."""
        self.rule = "ramp"
        self.alpha_start, self.alpha_max = map(float, self._ramp)
        slope = (self.alpha_max - self.alpha_start) / self._num_steps
        self._state = AlphaState(self.alpha_start, slope, self.start_step)

    def update(
        self,
        step: int,
        *,
        nll: Tensor | float | None = None,
        kl: Tensor | float | None = None,
        validation_loss: float | None = None,
    ) -> None:
        """Take note of a step that was done, and of an evaluation after it.

        `should_restore` then says, for the rule "restore", whether the weights of the lowest
        validation loss are to be loaded before the next step.

        Args:
            step: The optimiser step, counted from 0; the same on all ranks.
            nll: Its NLL, for the rule "gap"; on several ranks the mean over all of them,
                else alpha differs. Not read back from its device before an evaluation.
            kl: Its divergence, for the rule "kl-target", of all ranks too; 0 counts as not
                measured.
            validation_loss: Mean loss on validation data after the step, the same on all ranks; in
                nats for "gap".

        Raises:
            TypeError: If `step` is no integer, or another no number.
            ValueError: If `step` is negative, or a tensor holds more than one number.
        """
        check_integer("step", step, low=0)
        figures = {"nll": nll, "kl": kl, "validation_loss": validation_loss}
        for name, value in figures.items():
            _check_figure(name, value)
        self._next_step = int(step) + 1
        self.should_restore = False
        for name, value in (("nll", nll), ("kl", kl)):
            if value is not None:
                self._add(name, value)
        if validation_loss is None:
            return
        # A loss that is no number is as bad as any.
        loss = math.inf if math.isnan(validation_loss) else float(validation_loss)
        seen = Observation(
            self._next_step,
            loss,
            self._mean("nll"),
            self._mean("kl"),
            self.alpha_max,
            self.alpha_min,
            self.alpha_max / self._num_steps,
        )
        before = self._state
        # Without a step of R-Drop a loss says nothing of alpha.
        has_begun = self._next_step > self.start_step
        after = RULES[self.rule](before, seen) if has_begun else before
        self.should_restore = self.rule == "restore" and after.alpha != before.alpha
        best = seen.loss if before.best is None else min(before.best, seen.loss)
        self._state = replace(after, best=best, previous=seen.loss)
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs; plain numbers, which JSON can hold."""
        return {
            "rule": self.rule,
            "next_step": self._next_step,
            "sums": {name: float(value) for name, value in self._sums.items()},
            "state": asdict(self._state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            TypeError: If it is no mapping.
            ValueError: If it is of another rule, or was not made by `state_dict`. One of a run that
                had to follow the ramp is of any rule.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(
                f"state must be one of AlphaController.state_dict(), got {sorted(map(str, state))} "
                f"without {', '.join(missing)}"
            )
        if state["rule"] not in ("ramp", self.rule):
            raise ValueError(
                f"rule must be {state['rule']!r}, that of the checkpoint, got {self.rule!r}"
            )
        try:
            loaded = AlphaState(**state["state"])
        except TypeError as error:
            raise ValueError(
                f"state must be one of AlphaController.state_dict(), got {state['state']!r} as its "
                f"'state' ({error})"
            ) from error
        if state["rule"] == "ramp":
            self.follow_ramp()
        else:
            self._state = loaded
        self._next_step = state["next_step"]
        self._sums = dict(state["sums"])

    @property
    def _num_steps(self) -> int:
        return max(1, self.total_steps - self.start_step)

    def _add(self, name: str, value: Tensor | float) -> None:
        count: Tensor | float
        # A step that overflowed, which a scaler of gradients leaves out, says nothing.
        if isinstance(value, Tensor):
            # Half precision would stop counting at 256.
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            counts = value.isfinite() & (value != 0) if name == "kl" else value.isfinite()
            value, count = torch.where(counts, value, 0), counts.to(value.dtype)
        else:
            count = float(math.isfinite(value) and not (name == "kl" and value == 0))
            value = value if count else 0.0
        for key, term in ((name, value), (f"{name}_count", count)):
            self._sums[key] = self._sums.get(key, 0.0) + term

    def _mean(self, name: str) -> float | None:
        count = float(self._sums.get(f"{name}_count", 0.0))
        return float(self._sums[name]) / count if count else None
