"""Tables from records alone: figures of every arm and its paired difference to the baseline."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from regdrop.experiments.arms import BASELINE, arm_order
from regdrop.experiments.bootstrap import SAMPLES, Interval
from regdrop.experiments.examples import example_intervals
from regdrop.experiments.plots import draw_plots
from regdrop.experiments.record import RunRecord, load_records
from regdrop.experiments.statistics import Estimate, estimate, paired_difference
from regdrop.tasks import PRESETS, Metric


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
        cells: Test figures by metric.
        cost: Training time in times of the baseline, mean over seeds.
        best_part: Where the mean validation curve over seeds is best, as a part of the run; None
            if the records do not tell of which task they are.
        seeds: Number of seeds.
    """

    arm: str
    cells: dict[str, Cell]
    cost: float | None
    best_part: float | None
    seeds: int


def build_rows(records: Sequence[RunRecord]) -> list[Row]:
    """Return the rows of the table, the baseline first.

    Raises:
        ValueError: If the records are of several tasks.
    """
    tasks = sorted({record.task for record in records})
    if len(tasks) != 1:
        raise ValueError(f"records must be of one task, got {tasks}")
    by_arm: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_arm[record.arm].append(record)
    baseline = by_arm.get(BASELINE, [])
    rows = []
    for arm in sorted(by_arm, key=arm_order):
        runs = by_arm[arm]
        cells = {}
        for metric in runs[0].test:
            values = {run.seed: run.test[metric] for run in runs}
            own = {run.seed: run.test[metric] for run in baseline}
            paired = arm != BASELINE and bool(values.keys() & own.keys())
            cells[metric] = Cell(
                estimate(list(values.values())),
                paired_difference(values, own) if paired else None,
            )
        times = {run.seed: run.seconds for run in baseline}
        ratios = [run.seconds / times[run.seed] for run in runs if run.seed in times]
        rows.append(
            Row(
                arm,
                cells,
                sum(ratios) / len(ratios) if ratios else None,
                _best_part(runs, find_metrics(records)),
                len(runs),
            )
        )
    return rows


def _best_part(runs: Sequence[RunRecord], metrics: Mapping[str, Metric]) -> float | None:
    preset = PRESETS.get(runs[0].task)
    name = runs[0].config.get("selection_metric", preset and preset.selection_metric)
    if not isinstance(name, str) or name not in metrics:
        return None
    key = f"eval_{name}"
    curves = [{int(e["step"]): e[key] for e in run.history if key in e} for run in runs]
    steps = set.intersection(*(set(curve) for curve in curves))
    sign = 1 if metrics[name].greater_is_better else -1
    best = max(sorted(steps), key=lambda step: sign * sum(curve[step] for curve in curves))
    return best / runs[0].steps


def find_metrics(records: Sequence[RunRecord]) -> dict[str, Metric]:
    """Return how the figures of the records are read; unknown ones are shown as they are."""
    preset = PRESETS.get(records[0].task)
    known = {} if preset is None else preset.metrics
    metrics = {}
    for name in records[0].test:
        # Figures of a further test split begin with its name.
        split, _, own = name.partition("_")
        if name not in known and own in known:
            metrics[name] = replace(known[own], title=f"{split} {known[own].title}")
        else:
            metrics[name] = known.get(name, Metric(name, True))
    return metrics


def format_cell(cell: Cell, metric: Metric) -> str:
    """Return a figure as text, with its 95 % interval and its difference to the baseline."""
    factor, digits = (100, 2) if metric.percent else (1, 3)

    def number(x: float) -> str:
        return "n/a" if math.isinf(x) else f"{x * factor:.{digits}f}"

    text = f"{number(cell.value.mean)} ± {number(cell.value.half_width)}"
    if cell.difference is None:
        return text
    sign = "+" if cell.difference.mean >= 0 else "−"
    change = f"{sign}{number(abs(cell.difference.mean))} ± {number(cell.difference.half_width)}"
    return f"{text} ({change})"


def table_cells(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table as text."""
    metrics = find_metrics(records)
    header = ["arm", *(f"test {m.title}" for m in metrics.values()), "time", "best at", "seeds"]
    rows = [
        [
            row.arm,
            *(format_cell(row.cells[name], metric) for name, metric in metrics.items()),
            "n/a" if row.cost is None else f"{row.cost:.2f}x",
            "n/a" if row.best_part is None else f"{row.best_part:.0%}",
            str(row.seeds),
        ]
        for row in build_rows(records)
    ]
    return header, rows


CAPTION = (
    "Mean over seeds ± half the 95 % interval (Student's t); in brackets the paired difference to "
    "the baseline. Checkpoints are selected on the validation split; `time` is training time in "
    "times of the baseline's; `best at` is the part of the run at which the mean validation "
    "curve over seeds is best."
)


def example_cells(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of intervals over examples as text."""
    metrics = find_metrics(records)

    def text(interval: Interval, metric: Metric, signed: bool) -> str:
        factor, digits = (100, 2) if metric.percent else (1, 3)
        sign = "+" if signed else ""
        return " to ".join(f"{x * factor:{sign}.{digits}f}".replace("-", "−") for x in interval)

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


EXAMPLE_CAPTION = (
    f"95 % intervals over the test examples (percentile bootstrap, {SAMPLES} test sets) of the "
    "mean over seeds; in brackets those of the paired difference to the baseline. They tell what "
    "another test set would change, as the table above tells what other seeds would."
)


def write_report(folder: Path) -> Path:
    """Write `report.md` and the plots of a comparison, from its records alone.

    Raises:
        FileNotFoundError: If there are no records.
        ValueError: If they are of several tasks.
    """
    records = load_records(folder)
    header, rows = table_cells(records)
    lines = [
        f"# {records[0].task}: comparison of {len(rows)} arms",
        "",
        *_markdown_table(header, rows),
        CAPTION,
        "",
        *_example_lines(records),
        *_setting_lines(records),
        "",
    ]
    for path, title in draw_plots(records, find_metrics(records), folder):
        lines += [f"![{title}]({path.name})", ""]
    target = folder / "report.md"
    target.write_text("\n".join(lines), encoding="utf-8")
    return target


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _example_lines(records: Sequence[RunRecord]) -> list[str]:
    header, rows = example_cells(records)
    return [*_markdown_table(header, rows), EXAMPLE_CAPTION, ""] if rows else []


def _setting_lines(records: Sequence[RunRecord]) -> list[str]:
    first = records[0]
    seeds = sorted({record.seed for record in records})
    versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    hardware = ", ".join(f"{name}: {value}" for name, value in first.hardware.items())
    memory = [r.peak_memory_mib for r in records if r.peak_memory_mib is not None]
    lines = [
        f"- {first.config.get('description', first.task)}",
        f"- seeds: {', '.join(map(str, seeds))}",
        f"- versions: {versions}",
        f"- hardware: {hardware}",
    ]
    if memory:
        lines.append(f"- peak memory of a run: {min(memory):.0f} to {max(memory):.0f} MiB")
    return lines
