"""What each step of a Trainer's run does, and what the rule of alpha has seen of it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regdrop.alpha import AlphaController
from regdrop.config import RDropConfig
from regdrop.loss import ItemCounts
from regdrop.meter import LossMeter
from regdrop.schedule import (
    StepPlan,
    follows_validation,
    is_part_of_run,
    plan_step,
    refuse_unknown_length,
)


class StepPlanner:
    """Plans the steps of a run: by the config's schedule, or by a rule that makes alpha "auto".

    Args:
        config: The options.
        total_steps: Optimiser steps of the whole run; None where they are not known yet.
    """

    def __init__(self, config: RDropConfig, total_steps: int | None) -> None:
        self.total_steps = total_steps
        self.controller: AlphaController | None = None
        self._rule = _rule_of(config)
        if follows_validation(config) and total_steps is not None:
            self.controller = AlphaController.from_config(config, total_steps)
        # No rule would recover from a micro-batch that is not finite.
        self._seen = LossMeter(leaves_out=True)
        self._passes = self._batches = 0

    @property
    def reads_validation(self) -> bool:
        """Whether alpha follows the validation loss."""
        return self.controller is not None and self.controller.rule != "ramp"

    def plan(self, config: RDropConfig, step: int) -> StepPlan:
        """Return what a step does, by the options of that moment.

        Raises:
            ValueError: If a rule that follows the validation loss did not begin with the run as it
                is, or alpha is a part of a run that has no length yet.
        """
        if self.total_steps is None and is_part_of_run(config) and step >= config.start_step:
            refuse_unknown_length(
                config,
                "its steps are known once train() has begun, or by max_steps of the Trainer's "
                "arguments",
            )
        alpha = None
        if follows_validation(config) and self.total_steps is not None:
            if self.controller is None or _rule_of(config) != self._rule:
                raise ValueError(
                    f"alpha='auto' with alpha_rule={config.alpha_rule!r} must be given before "
                    "training begins, and alpha_min and alpha_max with it, got it for a run that "
                    "began with another alpha"
                )
            alpha = self.controller.alpha_at(step)
        return plan_step(config, step, total_steps=self.total_steps, alpha=alpha)

    def add(self, plan: StepPlan, nll: Tensor, kl: Tensor | None, counts: ItemCounts) -> None:
        """Take note of a micro-batch, as `LossMeter.add` does."""
        self._passes += plan.num_passes
        self._batches += 1
        if self.reads_validation:
            self._seen.add(plan, nll, kl, counts)

    def collect_passes(self) -> float:
        """Return the mean number of passes of the steps since the last call."""
        passes, self._passes, self._batches = self._passes / max(1, self._batches), 0, 0
        return passes

    def observe(self, step: int, loss: float, reduce: Callable[..., Any]) -> bool:
        """Take note of a validation loss after a step.

        Args:
            step: The step, counted from 0.
            loss: The same on all processes.
            reduce: Sums a tensor over all processes.

        Returns:
            Whether the weights of the best checkpoint are to be loaded.
        """
        assert self.controller is not None
        parts = {} if self._seen.is_empty else self._seen.collect(reduce)
        self.controller.update(step, nll=parts.get("nll"), kl=parts.get("kl"), validation_loss=loss)
        return self.controller.should_restore

    def state(self, reduce: Callable[..., Any]) -> dict[str, Any]:
        """Return what a checkpoint keeps, over all processes."""
        return {
            "total_steps": self.total_steps,
            "passes": [self._passes, self._batches],
            "rule": None if self.controller is None else self.controller.state_dict(),
            "seen": self._seen.state(reduce),
        }

    def load(self, state: Mapping[str, Any], device: torch.device, is_main: bool) -> None:
        """Take up what a checkpoint kept; sums over all processes on the main one alone."""
        self._passes, self._batches = state["passes"]
        # The ramp has no state: it is taken up by a run that has no validation loss any more, too.
        # One that was asked for leaves none, so that a run may go on from it by a rule.
        if self.controller is not None and self.reads_validation and state["rule"] is not None:
            self.controller.load_state_dict(state["rule"])
        if is_main:
            self._seen.load(state["seen"], device)


def _rule_of(config: RDropConfig) -> tuple[Any, ...]:
    return config.alpha_rule, config.highest_alpha, config.alpha_min


def find_validation_loss(metrics: Mapping[str, float], data: Any) -> float | None:
    """Return the loss of an evaluation, of several data sets by name that of the first.

    Args:
        metrics: What the evaluation gave.
        data: The validation data, as the Trainer takes it.

    Returns:
        The loss; None if there is none.
    """
    # A DatasetDict and a plain dictionary hold data sets, a Dataset is one.
    first = next(iter(data), None) if isinstance(data, dict) else None
    return metrics.get("eval_loss" if first is None else f"eval_{first}_loss")
