"""Tables from records alone: metrics of every arm and its paired difference to the reference."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from regdrop.experiments.arms import arm_order, reference_arm
from regdrop.experiments.bootstrap import SAMPLES, Interval
from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.reporting.cost import run_cost
from regdrop.experiments.reporting.per_example import example_intervals
from regdrop.experiments.statistics import Estimate, estimate, paired_difference
from regdrop.tasks import FAMILIES, PRESETS, Metric, Task
from regdrop.tasks.configure import task_from_config


@dataclass(frozen=True)
class Cell:
    """One figure of one arm: its mean and its difference to the baseline."""

    value: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Row:
    """One arm of the table.

    Attributes:
        arm: Name of the arm.
        cells: Test values by metric.
        cost: Operations, counted in single-pass steps over the steps of the reference.
        time: Training time in times of the reference, mean over seeds.
        best_part: Where the mean validation curve over seeds is best, as a part of the run; None
            if the records do not tell of which task they are.
        seeds: Number of seeds.
    """

    arm: str
    cells: dict[str, Cell]
    cost: float
    time: float | None
    best_part: float | None
    seeds: int


def build_rows(records: Sequence[RunRecord]) -> list[Row]:
    """Return the rows of the table, the reference first.

    Raises:
        ValueError: If the records are of several tasks.
    """
    tasks = sorted({record.task for record in records})
    if len(tasks) != 1:
        raise ValueError(f"records must be of one task, got {tasks}")
    by_arm = runs_by_arm(records)
    metrics = find_metrics(records)
    reference = reference_arm(by_arm)
    baseline = by_arm.get(reference or "", [])
    times = {run.seed: run.seconds for run in baseline}
    rows = []
    for arm, runs in by_arm.items():
        ratios = [run.seconds / times[run.seed] for run in runs if run.seed in times]
        rows.append(
            Row(
                arm,
                _cells(runs, [] if arm == reference else baseline),
                # A rule may give every seed its own number of passes.
                sum(run_cost(run, baseline[0] if baseline else None) for run in runs) / len(runs),
                sum(ratios) / len(ratios) if ratios else None,
                _best_part(runs, metrics),
                len(runs),
            )
        )
    return rows


def runs_by_arm(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Return the records of each arm, the reference first."""
    by_arm: dict[str, list[RunRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda record: arm_order(record.arm)):
        by_arm[record.arm].append(record)
    return dict(by_arm)


def _cells(runs: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> dict[str, Cell]:
    """Return the test values of an arm, with the differences where there are seeds of both."""
    cells = {}
    for metric in runs[0].test:
        values = {run.seed: run.test[metric] for run in runs}
        own = {run.seed: run.test[metric] for run in baseline}
        difference = paired_difference(values, own) if values.keys() & own.keys() else None
        cells[metric] = Cell(estimate(list(values.values())), difference)
    return cells


def _best_part(runs: Sequence[RunRecord], metrics: Mapping[str, Metric]) -> float | None:
    name = run_selection_metric(runs[0])
    if name is None or name not in metrics:
        return None
    key = f"eval_{name}"
    curves = [{int(e["step"]): e[key] for e in run.history if key in e} for run in runs]
    steps = set.intersection(*(set(curve) for curve in curves))
    sign = 1 if metrics[name].greater_is_better else -1
    best = max(sorted(steps), key=lambda step: sign * sum(curve[step] for curve in curves))
    return best / runs[0].steps


def run_selection_metric(record: RunRecord) -> str | None:
    """Return the figure by which a run selected its checkpoint; None if nothing tells."""
    task = _task_of(record)
    name: str | None = record.config.get("selection_metric", task and task.selection_metric)
    return name


def find_metrics(records: Sequence[RunRecord]) -> dict[str, Metric]:
    """Return how the metrics of the records are read, as they tell, their settings or the preset.

    Raises:
        ValueError: For a metric of which none tells whether more of it is better.
    """
    told = next((record.metrics for record in records if record.metrics), {})
    known = {name: Metric(**how) for name, how in told.items()}
    if not known and (task := _task_of(records[0])):
        known = task.metrics
    metrics = {}
    for name in records[0].test:
        # Figures of a further test split begin with its name.
        split, _, own = name.partition("_")
        if name not in known and own in known:
            metrics[name] = replace(known[own], title=f"{split} {known[own].title}")
        elif name in known:
            metrics[name] = known[name]
        else:
            raise ValueError(
                f"the records of {records[0].task!r} hold the metric {name!r}, and nothing tells "
                f"whether more of it is better: neither they nor their settings (family "
                f"{records[0].config.get('family')!r}) nor a preset of that name"
            )
    return metrics


def _task_of(record: RunRecord) -> Task | None:
    """Return the task of a run: from its settings, or by its name where they tell none."""
    if record.config.get("family") in FAMILIES:
        with suppress(ValueError):
            return task_from_config(record.config)
    return PRESETS.get(record.task)


def format_cell(cell: Cell, metric: Metric) -> str:
    """Return a figure as text, with its 95 % interval and its difference to the baseline.

    A figure of one seed has no interval and stands alone.
    """

    def number(mean: float, half_width: float) -> str:
        text = metric.format(mean)
        return text if math.isinf(half_width) else f"{text} ± {metric.format(half_width)}"

    text = number(cell.value.mean, cell.value.half_width)
    if cell.difference is None:
        return text
    sign = "+" if cell.difference.mean >= 0 else "−"
    return f"{text} ({sign}{number(abs(cell.difference.mean), cell.difference.half_width)})"


def table_cells(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table as text."""
    metrics = find_metrics(records)
    titles = [f"test {metric.title}" for metric in metrics.values()]
    header = ["arm", *titles, "cost", "time", "best at", "seeds"]
    rows = [
        [
            row.arm,
            *(format_cell(row.cells[name], metric) for name, metric in metrics.items()),
            f"{row.cost:.2f}",
            "n/a" if row.time is None else f"{row.time:.2f}x",
            "n/a" if row.best_part is None else f"{row.best_part:.0%}",
            str(row.seeds),
        ]
        for row in build_rows(records)
    ]
    return header, rows


def caption(records: Sequence[RunRecord]) -> str:
    """Return what the table of all arms shows."""
    reference = reference_arm({record.arm for record in records})
    difference = "" if reference is None else f"; in brackets the paired difference to {reference}"
    unit = "one pass" if reference is None else f"one pass of {reference}"
    time = "" if reference is None else f" in times of {reference}'s"
    return (
        f"Mean over seeds ± half the 95 % interval (Student's t){difference}. Checkpoints are "
        f"selected on the validation split. Cost counts the operations of a run in steps of {unit} "
        f"(a forward is a third of one); time is training time{time}; best at is the part of the "
        "run at which the mean validation curve over seeds is best."
    )


def example_cells(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of intervals over examples as text."""
    metrics = find_metrics(records)

    def text(interval: Interval, metric: Metric, signed: bool) -> str:
        style = f"{'+' if signed else ''}.{metric.decimals}f"
        return " to ".join(f"{x * metric.factor:{style}}".replace("-", "−") for x in interval)

    rows = []
    for arm, intervals in example_intervals(records).items():
        row = [arm]
        for name, metric in metrics.items():
            own, difference = intervals[name]
            row.append(text(own, metric, signed=False))
            if difference is not None:
                row[-1] += f" ({text(difference, metric, signed=True)})"
        rows.append(row)
    return ["arm", *(f"test {metric.title}" for metric in metrics.values())], rows


def example_caption(records: Sequence[RunRecord]) -> str:
    """Return what the table of intervals over examples shows."""
    reference = reference_arm({record.arm for record in records})
    difference = (
        "" if reference is None else f"; in brackets of the paired difference to {reference}"
    )
    return (
        f"95 % intervals over the test examples (percentile bootstrap, {SAMPLES} test sets) of the "
        f"mean over seeds{difference}. They tell what another test set would change, as the table "
        "above tells what other seeds would."
    )
