"""The arms of the study of alpha over a run: constants, ramps, rules, and cheaper forms of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from regdrop.alpha import RULES
from regdrop.config import RDropConfig
from regdrop.experiments.arms import Arm, baseline_arm, changed_arm, changed_rdrop
from regdrop.tasks import Task

# The settings of every rule for alpha: the end of a ramp, the most that another may give.
_ALPHA_ENDS = (8.0, 16.0, 32.0)
_ALPHA_STARTS = (3.0, 6.0)
# Ramps around the constants that are good on most tasks: their begin and their end.
_NARROW_RAMPS = ((3.0, 10.0), (4.0, 12.0))


def constant_alphas(task: Task, grid: Sequence[float]) -> list[Arm]:
    """Return R-Drop with each of some constants as alpha."""
    return [
        Arm(
            f"alpha-{a:g}", f"R-Drop, alpha {a:g}", changed_rdrop(task).with_alpha(a), task.training
        )
        for a in grid
    ]


def alpha_schedules(task: Task, grid: Sequence[float]) -> list[Arm]:
    """Return constants, ramps, rules and cheaper ramps; of a ramp to 16 the mean alpha is 8."""
    plain = replace(task, rdrop=_without_schedule(task.rdrop))
    baseline = baseline_arm(task)
    rising_dropout = replace(
        baseline,
        name="rising-dropout-4",
        description="one pass, the odds of its dropout rising to 4 times over the run",
        dropout_odds=4.0,
        dropout_rises=True,
    )
    half = round(task.training.max_steps / 2)
    late_start, constant_late_start = (
        changed_arm(
            plain,
            name,
            f"R-Drop, alpha {alpha:g} in the second half of the steps",
            alpha=alpha,
            start_step=half,
        )
        for name, alpha in (("late-start", 16.0), ("alpha-6-late-start", 6.0))
    )
    every_second = changed_arm(
        plain, "alpha-6-every-2", "R-Drop, alpha 6 on every 2nd step", alpha=6.0, every_n_steps=2
    )
    return [
        baseline,
        *constant_alphas(plain, grid),
        *_ramps(plain),
        *_rules(plain),
        rising_dropout,
        late_start,
        *_cheaper_ramps(plain, "ramp-16", 0.0, 16.0, (8.0, 5.0)),
        *_cheaper_ramps(plain, "narrow-ramp-10", 3.0, 10.0, (6.5, 5.2)),
        every_second,
        constant_late_start,
    ]


def _ramps(task: Task) -> list[Arm]:
    ramps = [("ramp", 0.0, end) for end in _ALPHA_ENDS]
    ramps += [("narrow-ramp", start, end) for start, end in _NARROW_RAMPS]
    return [
        _rising(
            task,
            f"{name}-{end:g}",
            f"from {start:g} to {end:g} over the run",
            alpha_start=start,
            alpha_max=end,
        )
        for name, start, end in ramps
    ]


def _rules(task: Task) -> list[Arm]:
    """Return the rules that read the validation loss, from 1 to several ends, and later begins."""
    # To go back to the best checkpoint it has to be kept.
    left_out = {"ramp"} | ({"restore"} if task.training.average_checkpoints > 1 else set())
    arms = [
        _rising(
            task,
            f"{rule}-{end:g}",
            f"by the rule {rule}, at most {end:g}",
            alpha_rule=rule,
            alpha_max=end,
        )
        for rule in RULES
        if rule not in left_out
        for end in _ALPHA_ENDS
    ]
    later = [
        _rising(
            task,
            f"{rule}-16-from-{start:g}",
            f"by the rule {rule}, from {start:g} to at most 16",
            alpha_rule=rule,
            alpha_min=start,
            alpha_max=16.0,
        )
        for rule in ("stall", "ramp-from-stall")
        for start in _ALPHA_STARTS
    ]
    cheaper = _rising(
        task,
        "ramp-from-stall-16-from-3-every-2",
        "by the rule ramp-from-stall, from 3 to at most 16, on every 2nd step",
        alpha_rule="ramp-from-stall",
        alpha_min=3.0,
        alpha_max=16.0,
        every_n_steps=2,
    )
    return [*arms, *later, cheaper]


def _cheaper_ramps(
    task: Task, ramp: str, start: float, end: float, thresholds: tuple[float, float]
) -> list[Arm]:
    """Return a ramp with one pass in its first half, on every 2nd step, and with some of both."""
    alone, together = thresholds
    ways: list[tuple[str, str, dict[str, Any]]] = [
        (f"below-{alone:g}", f"one pass below {alone:g}", {"single_pass_below": alone}),
        ("every-2", "on every 2nd step", {"every_n_steps": 2}),
        (
            f"below-{together:g}-every-2",
            f"one pass below {together:g}, then on every 2nd step",
            {"single_pass_below": together, "every_n_steps": 2},
        ),
    ]
    return [
        _rising(
            task,
            f"{ramp}-{name}",
            f"from {start:g} to {end:g}, {text}",
            alpha_start=start,
            alpha_max=end,
            **changes,
        )
        for name, text, changes in ways
    ]


def _rising(task: Task, name: str, text: str, **changes: Any) -> Arm:
    return changed_arm(task, name, f"R-Drop, alpha {text}", alpha="auto", **changes)


def _without_schedule(rdrop: RDropConfig) -> RDropConfig:
    return replace(
        rdrop.with_alpha(1.0),
        alpha_schedule="constant",
        alpha_start=None,
        alpha_warmup_steps=0,
        alpha_warmup_ratio=None,
        start_step=0,
        every_n_steps=1,
    )
