"""Comparisons of ways of training: runs, their records, and reports drawn from records alone."""

from typing import Any

from regdrop.experiments.arms import Arm, build_arms, compared_arms
from regdrop.experiments.recording.record import RunRecord, load_records
from regdrop.experiments.reporting.report import write_report
from regdrop.experiments.running.run import run_arm
from regdrop.experiments.running.runner import run_arms
from regdrop.experiments.statistics import Estimate, estimate, paired_difference

__all__ = [
    "Arm",
    "Estimate",
    "RunRecord",
    "build_arms",
    "compared_arms",
    "estimate",
    "load_records",
    "paired_difference",
    "run_arm",
    "run_arms",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Return what had another name in 0.1, with a warning."""
    if name == "compare":
        import warnings

        warnings.warn(
            "compare(task, ...) is now run_arms(task, compared_arms(task), ...)",
            DeprecationWarning,
            stacklevel=2,
        )
        return _compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _compare(task: Any, *, arms: Any = None, **options: Any) -> list[RunRecord]:
    return run_arms(task, compared_arms(task, arms), **options)
