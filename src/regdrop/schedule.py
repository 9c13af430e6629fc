"""When R-Drop acts and how strongly: what one optimiser step does."""

import math
from typing import NamedTuple

from regdrop.config import RDropConfig


class StepPlan(NamedTuple):
    """What one optimiser step does.

    Attributes:
        num_passes: Passes of the batch.
        alpha: Weight of the divergence in this step.
        factor: What the loss of a step with one pass is multiplied by, so that the weight of the
            likelihood is that of the other steps.
    """

    num_passes: int
    alpha: float
    factor: float


def plan_step(config: RDropConfig, step: int) -> StepPlan:
    """Return what optimiser step `step`, counted from 0, does.

    Raises:
        ValueError: If `step` is negative.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    elapsed = step - config.start_step
    if config.num_passes == 1:
        return StepPlan(1, 0.0, 1.0)
    if elapsed < 0 or elapsed % config.every_n_steps:
        return StepPlan(1, 0.0, config.num_passes if config.scale == "sum" else 1.0)
    alpha = config.alpha * _ramp(config, elapsed)
    if config.rescale:
        alpha *= config.every_n_steps
    return StepPlan(config.num_passes, alpha, 1.0)


def is_monitored(config: RDropConfig, step: int) -> bool:
    """Return whether the divergence is measured by an extra pass where step has one pass."""
    return config.monitor_steps is not None and step % config.monitor_steps == 0


def _ramp(config: RDropConfig, elapsed: int) -> float:
    if config.alpha_schedule == "constant":
        return 1.0
    progress = min(1.0, elapsed / config.alpha_warmup_steps)
    if config.alpha_schedule == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    return progress
