"""What the test examples say beside the seeds: every arm's metrics on resampled test sets."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np

from regdrop.experiments.arms import arm_order, reference_arm
from regdrop.experiments.bootstrap import Interval, interval, resample
from regdrop.experiments.recording.record import RunRecord
from regdrop.tasks.configure import task_from_config

# From the names of metrics to the interval of an arm, and to that of its difference.
ArmIntervals = dict[str, tuple[Interval, Interval | None]]


def example_intervals(records: Sequence[RunRecord]) -> dict[str, ArmIntervals]:
    """Return 95 % intervals over the test examples of every arm's mean over seeds.

    A difference to the baseline is that of the seeds which both have, on the same examples. Arms
    whose records hold no statistics of examples, or those of a task of one's own, are left out.

    Args:
        records: Records of one task, whose examples are in one order.

    Raises:
        ValueError: If the records are not of the same examples.
    """
    by_arm: dict[str, dict[int, RunRecord]] = {}
    for record in sorted(records, key=lambda record: arm_order(record.arm)):
        if record.examples and _has_known_metrics(record):
            by_arm.setdefault(record.arm, {})[record.seed] = record
    reference = reference_arm(by_arm)
    baseline = by_arm.get(reference or "", {})
    drawn = {arm: _resample(list(runs.values())) for arm, runs in by_arm.items()}
    result: dict[str, ArmIntervals] = {}
    for arm, runs in by_arm.items():
        differences: Mapping[str, np.ndarray] = {}
        common = sorted(runs.keys() & baseline.keys())
        if reference is not None and arm != reference and common:
            _check_same_examples(runs[common[0]], baseline[common[0]])
            ours, theirs = (
                drawn[name]
                if len(all_of) == len(common)
                else _resample([all_of[s] for s in common])
                for name, all_of in ((arm, runs), (reference, baseline))
            )
            differences = {name: values - theirs[name] for name, values in ours.items()}
        result[arm] = {
            name: (interval(values), interval(differences[name]) if differences else None)
            for name, values in drawn[arm].items()
        }
    return result


def _has_known_metrics(record: RunRecord) -> bool:
    """Return whether the metrics of a record are those of a task that its settings tell."""
    with suppress(ValueError):
        return record.validation.keys() <= task_from_config(record.config).metrics.keys()
    return False


def _check_same_examples(run: RunRecord, other: RunRecord) -> None:
    sizes = [{name: len(rows) for name, rows in r.examples.items()} for r in (run, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{run.arm} and {other.arm} must be tested on the same examples, got {sizes[0]} and "
            f"{sizes[1]} of them"
        )


def _resample(runs: Sequence[RunRecord]) -> dict[str, np.ndarray]:
    """Return the resampled metrics of all test splits, named as in the records."""
    task = task_from_config(runs[0].config)
    result = {}
    for split in runs[0].examples:
        prefix = "" if split == "test" else f"{split}_"
        drawn = resample(task.compute_metrics, [np.asarray(run.examples[split]) for run in runs])
        result.update({prefix + name: values for name, values in drawn.items()})
    return result
