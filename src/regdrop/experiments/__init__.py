"""Comparisons of ways of training: runs, their records, and reports drawn from records alone."""

from regdrop.experiments.arms import Arm, build_arms
from regdrop.experiments.recording.record import RunRecord, load_records
from regdrop.experiments.reporting.report import write_report
from regdrop.experiments.running.compare import compare
from regdrop.experiments.running.parallel import run_arms
from regdrop.experiments.running.run import run_arm
from regdrop.experiments.statistics import Estimate, estimate, paired_difference

__all__ = [
    "Arm",
    "Estimate",
    "RunRecord",
    "build_arms",
    "compare",
    "estimate",
    "load_records",
    "paired_difference",
    "run_arm",
    "run_arms",
    "write_report",
]
