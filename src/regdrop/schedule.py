"""When R-Drop acts and how strongly: what one optimiser step does."""

import math
from typing import NamedTuple, NoReturn

from regdrop.alpha_options import auto_range
from regdrop.config import RDropConfig


class StepPlan(NamedTuple):
    """What one optimiser step does.

    Attributes:
        num_passes: Passes of the batch.
        alpha: Weight of the divergence in this step.
        factor: What the loss of a step with one pass is multiplied by, so that the weight of the
            NLL is that of the other steps.
    """

    num_passes: int
    alpha: float
    factor: float


def plan_step(
    config: RDropConfig,
    step: int,
    *,
    total_steps: int | None = None,
    alpha: float | None = None,
) -> StepPlan:
    """Return what optimiser step `step`, counted from 0, does.

    Args:
        config: The options.
        step: The step.
        total_steps: Steps of the whole run, of which alpha="auto" and `alpha_warmup_ratio` are
            parts.
        alpha: Weight of the divergence by an `AlphaController`, instead of the config's.

    Raises:
        ValueError: If `step` is negative, or alpha cannot be known without an argument that is
            None.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    elapsed = step - config.start_step
    if config.num_passes == 1:
        return StepPlan(1, 0.0, 1.0)
    single = StepPlan(1, 0.0, config.num_passes if config.scale == "sum" else 1.0)
    if elapsed < 0 or elapsed % config.every_n_steps:
        return single
    if alpha is None:
        alpha = scheduled_alpha(config, step, total_steps)
    if config.single_pass_below is not None and alpha < config.single_pass_below:
        return single
    if config.rescale:
        alpha *= config.every_n_steps
    return StepPlan(config.num_passes, alpha, 1.0)


def scheduled_alpha(config: RDropConfig, step: int, total_steps: int | None = None) -> float:
    """Return alpha as it is scheduled for a step, before `every_n_steps` multiplies it.

    Args:
        config: The options.
        step: The step, counted from 0; 0 comes out before `start_step`.
        total_steps: Steps of the whole run.

    Raises:
        ValueError: If the schedule needs `total_steps`, or a rule that no step knows of.
    """
    elapsed = step - config.start_step
    if elapsed < 0:
        return 0.0
    if config.alpha == "auto":
        if config.alpha_rule != "ramp":
            raise ValueError(
                f"alpha_rule={config.alpha_rule!r} follows the validation loss: give "
                "alpha=controller.alpha of a regdrop.AlphaController"
            )
        progress = _progress(elapsed, _ramp_steps(config, 1.0, total_steps))
        return _between(*_auto_ramp(config), progress)
    if config.alpha_schedule == "constant":
        return config.alpha
    length: float = config.alpha_warmup_steps
    if config.alpha_warmup_ratio is not None:
        length = _ramp_steps(config, config.alpha_warmup_ratio, total_steps)
    progress = _progress(elapsed, length)
    if config.alpha_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return _between(config.alpha_start or 0.0, config.alpha, progress)


def is_monitored(config: RDropConfig, step: int) -> bool:
    """Return whether the divergence is measured by an extra pass where step has one pass."""
    return config.monitor_steps is not None and step % config.monitor_steps == 0


def follows_validation(config: RDropConfig) -> bool:
    """Return whether alpha is "auto" by a rule that reads the validation loss."""
    return config.alpha == "auto" and config.alpha_rule != "ramp"


def refuse_validation_rule(config: RDropConfig, who: str) -> None:
    """Refuse a rule of alpha that reads the validation loss, for what sees none.

    Args:
        config: The options.
        who: What sees none, as in "a training step".

    Raises:
        ValueError: If alpha is "auto" by such a rule.
    """
    if follows_validation(config):
        raise ValueError(
            f"alpha_rule must be 'ramp', got {config.alpha_rule!r}: {who} sees no validation; "
            "RDropTrainer does, and a loop of your own by an AlphaController"
        )


def is_part_of_run(config: RDropConfig) -> bool:
    """Return whether alpha changes over a part of the run, whose length must be known then."""
    is_ramp = config.alpha == "auto" or config.alpha_warmup_ratio is not None
    return config.num_passes > 1 and is_ramp


def refuse_unknown_length(config: RDropConfig, way_out: str) -> NoReturn:
    """Refuse what `is_part_of_run` in a run whose length nobody knows.

    Args:
        config: The options.
        way_out: How the length is given, as in "give total_steps".

    Raises:
        ValueError: Always; also names the options that need no length.
    """
    name, other = f"alpha_warmup_ratio={config.alpha_warmup_ratio}", "alpha_warmup_steps instead"
    if config.alpha == "auto":
        start, end = _auto_ramp(config)
        name = "alpha='auto'"
        other = (
            f"alpha={end:g} with alpha_schedule='linear', alpha_start={start:g} and "
            "alpha_warmup_steps"
        )
    raise ValueError(f"{name} is a part of the run: {way_out}; or use {other}, a number of steps")


def _auto_ramp(config: RDropConfig) -> tuple[float, float]:
    return auto_range("ramp", config.alpha_start, config.alpha_max)


def _ramp_steps(config: RDropConfig, ratio: float, total_steps: int | None) -> float:
    if total_steps is None:
        way_out = "give total_steps, the number of optimiser steps of the whole run"
        refuse_unknown_length(config, way_out)
    return ratio * (total_steps - config.start_step)


def _between(start: float, end: float, progress: float) -> float:
    return start * (1 - progress) + end * progress


def _progress(elapsed: int, length: float) -> float:
    return min(1.0, elapsed / length) if length > 0 else 1.0
