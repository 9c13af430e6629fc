"""What a step of R-Drop costs, counted in steps of one pass."""

from dataclasses import fields, replace

from regdrop.config import RDropConfig
from regdrop.schedule import follows_validation, plan_step

# One training step without R-Drop is one part forward and two parts backward.
_FORWARD_SHARE = 1 / 3
# What the cost of a step comes from, and what tells which steps have one pass.
_STEP_OPTIONS = ("num_passes", "backward_passes", "fraction", "every_n_steps", "single_pass_below")
_ALPHA_OPTIONS = (
    *("alpha", "alpha_start", "alpha_rule", "alpha_max"),
    *("alpha_schedule", "alpha_warmup_ratio", "alpha_warmup_steps"),
)
# How many steps with R-Drop a long run has at least.
_LONG_RUN = 1000


def expected_cost(config: RDropConfig, total_steps: int | None = None) -> float:
    """Return the cost of a step in steps of one pass, the mean over the steps of a run.

    A forward counts as one third of a step and a backward as two thirds; loss, optimiser and data
    count as nothing, so that the figure is an estimate, not a measurement. Steps with one pass,
    by `every_n_steps`, `start_step` or `single_pass_below`, count as 1.

    Args:
        config: The options. A rule of alpha that follows the validation loss is taken never to be
            below `single_pass_below`, since nobody knows beforehand.
        total_steps: Optimiser steps of the run. None: a long one, of which `start_step` and a ramp
            of so many steps are no part.
    """
    return 1 + (full_step_cost(config) - 1) * _share_of_full_steps(config, total_steps)


def full_step_cost(config: RDropConfig) -> float:
    """Return the cost of a step with all passes in steps of one pass, as `expected_cost` counts."""
    passes = config.num_passes
    graded = passes if config.backward_passes is None else config.backward_passes
    forwards = 1 + (passes - 1) * config.fraction
    backwards = 1 + (graded - 1) * config.fraction
    return _FORWARD_SHARE * forwards + (1 - _FORWARD_SHARE) * backwards


def describe_cost_options(config: RDropConfig) -> str:
    """Return the options that the cost of a step comes from, without those left as they are."""
    names: tuple[str, ...] = _STEP_OPTIONS
    if config.single_pass_below is not None:
        names = (*_ALPHA_OPTIONS, *_STEP_OPTIONS)
    defaults = {one.name: one.default for one in fields(config)}
    given = {name: getattr(config, name) for name in names}
    changed = {n: v for n, v in given.items() if v != defaults[n] or n == "num_passes"}
    return ", ".join(f"{name}={value!r}" for name, value in changed.items())


def _share_of_full_steps(config: RDropConfig, total_steps: int | None) -> float:
    """Return the share of a run's steps that have all passes."""
    alpha = None
    if follows_validation(config):
        alpha = config.highest_alpha
    if total_steps is None:
        if config.alpha != "auto" and config.alpha_warmup_steps:
            alpha = config.alpha
        config, total_steps = replace(config, start_step=0), _LONG_RUN * config.every_n_steps
    plans = (
        plan_step(config, step, total_steps=total_steps, alpha=alpha) for step in range(total_steps)
    )
    return sum(plan.num_passes == config.num_passes for plan in plans) / total_steps
