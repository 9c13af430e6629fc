"""What each study asks, drawn: metrics against what is varied, a heat map, metrics against cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.reporting.plots import (
    COLOURS,
    DIVERGENCE,
    TRAINING_NLL,
    Curve,
    draw_curves,
    new_figure,
    save_figure,
)
from regdrop.experiments.reporting.tables import build_rows
from regdrop.experiments.statistics import Estimate
from regdrop.tasks import Metric

Drawer = Callable[[Sequence[RunRecord], Mapping[str, Metric], Path], list[tuple[Path, str]]]
# The titles of the lines that a run is a point of.
Series = Callable[[RunRecord], Sequence[str]]
MARKERS = "osD^vP*X<>hd"


def draw_study(
    study: str, records: Sequence[RunRecord], metrics: Mapping[str, Metric], folder: Path
) -> list[tuple[Path, str]]:
    """Draw the plot of a study and return its file and title; nothing for one without."""
    drawer = DRAWERS.get(study)
    return [] if drawer is None else drawer(records, metrics, folder)


def pareto_front(points: Sequence[tuple[float, float]], greater_is_better: bool) -> list[int]:
    """Return the positions of the points that none beats in both cost and value, by cost.

    Args:
        points: Cost and value of each.
        greater_is_better: The direction of the value.
    """
    sign = 1 if greater_is_better else -1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or sign * points[i][1] > sign * points[front[-1]][1]:
            front.append(i)
    return front


def _draw_lines(
    setting: str,
    label: str,
    series: Series,
    records: Sequence[RunRecord],
    metrics: Mapping[str, Metric],
    folder: Path,
) -> list[tuple[Path, str]]:
    """Draw the test metrics against one setting of R-Drop.

    A run is a point of the lines that `series` names; of none, it is a level over all of them.
    """
    rows = {row.arm: row for row in build_rows(records)}
    x_of = {record.arm: float(record.config["rdrop"][setting]) for record in records}
    places = {x: i for i, x in enumerate(sorted(set(x_of.values())))}
    titles_of = {record.arm: series(record) for record in records}
    lines = _lines_of(rows, titles_of)
    figure, panels = new_figure(len(metrics))
    for (name, metric), panel in zip(metrics.items(), panels, strict=False):
        values = {arm: _in_units(row.cells[name].value, metric) for arm, row in rows.items()}
        for arm in (arm for arm in rows if not titles_of[arm]):
            panel.axhline(values[arm][0], color=COLOURS[0], linestyle="--", label=arm)
        for colour, (title, arms) in zip(COLOURS[2:], lines.items(), strict=False):
            arms = sorted(arms, key=lambda arm: x_of[arm])
            x = [places[x_of[arm]] for arm in arms]
            means, errors = zip(*(values[arm] for arm in arms), strict=True)
            panel.errorbar(x, means, errors, color=colour, marker="o", capsize=3, label=title)
        panel.set_xticks(list(places.values()), [f"{x:g}" for x in places])
        panel.set_xlabel(label)
        panel.set_title(f"test {metric.title}")
        panel.grid(alpha=0.3)
    path = save_figure(figure, folder / f"{setting}.png")
    return [(path, f"Test metrics by {label}: mean over seeds and 95 % interval")]


def _lines_of(arms: Iterable[str], titles_of: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the arms of each line, but for lines that share all of their points with a longer one.

    Those show nothing of their own.
    """
    lines: dict[str, list[str]] = {}
    for arm in arms:
        for title in titles_of[arm]:
            lines.setdefault(title, []).append(arm)
    return {
        title: points
        for title, points in lines.items()
        if not any(set(points) < set(others) for others in lines.values())
    }


def _in_units(value: Estimate, metric: Metric) -> tuple[float, float]:
    """Return a mean and half its interval as the metric is shown; 0 for an unknown interval."""
    half = value.half_width if np.isfinite(value.half_width) else 0.0
    return value.mean * metric.factor, half * metric.factor


def _draw_rates(
    records: Sequence[RunRecord], metrics: Mapping[str, Metric], folder: Path
) -> list[tuple[Path, str]]:
    """Draw the mean test metrics of every pair of dropout rates as heat maps."""
    rows = {row.arm: row for row in build_rows(records)}
    pairs = {record.arm: tuple(record.config["rdrop"]["dropout_rates"] or ()) for record in records}
    pairs = {arm: pair for arm, pair in pairs.items() if len(pair) == 2}
    rates = sorted({rate for pair in pairs.values() for rate in pair})
    figure, panels = new_figure(len(metrics))
    for (name, metric), panel in zip(metrics.items(), panels, strict=False):
        grid = np.full((len(rates), len(rates)), np.nan)
        for arm, (p, q) in pairs.items():
            i, j = rates.index(p), rates.index(q)
            grid[i, j] = grid[j, i] = rows[arm].cells[name].value.mean
        grid = grid * metric.factor
        colours = "viridis" if metric.greater_is_better else "viridis_r"
        image = panel.imshow(grid, cmap=colours, origin="lower")
        middle = (np.nanmax(grid) + np.nanmin(grid)) / 2
        for i, j in np.ndindex(grid.shape):
            is_light = (grid[i, j] > middle) == metric.greater_is_better
            text = "" if np.isnan(grid[i, j]) else f"{grid[i, j]:.3g}"
            panel.text(j, i, text, ha="center", va="center", color="black" if is_light else "white")
        ticks = list(range(len(rates)))
        panel.set_xticks(ticks, [f"{rate:g}" for rate in rates])
        panel.set_yticks(ticks, [f"{rate:g}" for rate in rates])
        panel.set_xlabel("dropout rate of one pass")
        panel.set_ylabel("dropout rate of the other")
        panel.set_title(f"test {metric.title}")
        figure.colorbar(image, ax=panel)
    path = save_figure(figure, folder / "dropout_rates.png", legend=False)
    return [(path, "Mean test metrics of every pair of dropout rates, lighter is better")]


def _draw_cost(
    records: Sequence[RunRecord], metrics: Mapping[str, Metric], folder: Path
) -> list[tuple[Path, str]]:
    """Draw the test metrics against the cost and the time of a run, with their Pareto fronts."""
    rows = build_rows(records)
    costs = {
        "operations, in single-pass steps of the baseline": {row.arm: row.cost for row in rows}
    }
    times = {row.arm: row.time for row in rows if row.time is not None}
    if times:  # without a baseline there is no time of it
        costs["training time, in times of the baseline's"] = times
    figure, panels = new_figure(len(costs) * len(metrics))
    for name, metric in metrics.items():
        values = {row.arm: _in_units(row.cells[name].value, metric) for row in rows}
        for label, cost_of in costs.items():
            panel = next(panels)
            points = [(cost, *values[arm]) for arm, cost in cost_of.items()]
            _draw_front(panel, list(cost_of), points, metric.greater_is_better)
            panel.set_xlabel(label)
            panel.set_title(f"test {metric.title}")
            panel.grid(alpha=0.3)
    path = save_figure(figure, folder / "cost.png")
    title = "Test metrics against cost and time, and what no arm beats in both (dashed)"
    return [(path, f"{title}; arms of one cost are drawn a little apart")]


def _draw_front(
    panel: Any,
    arms: Sequence[str],
    points: Sequence[tuple[float, float, float]],
    greater_is_better: bool,
) -> None:
    """Draw arms as points, each its cost, its value and half the interval, and their front."""
    shown = _apart([cost for cost, _, _ in points])
    for i, (arm, x, (_, y, half)) in enumerate(zip(arms, shown, points, strict=True)):
        panel.errorbar(
            x,
            y,
            half,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=7,
            linewidth=1,
            linestyle="",
            capsize=2,
            label=arm,
        )
    front = pareto_front([(cost, value) for cost, value, _ in points], greater_is_better)
    panel.plot(
        [shown[i] for i in front],
        [points[i][1] for i in front],
        color="#888888",
        linestyle="--",
        linewidth=1,
        zorder=0,
    )


def _draw_alpha_schedules(
    records: Sequence[RunRecord], metrics: Mapping[str, Metric], folder: Path
) -> list[tuple[Path, str]]:
    """Draw metrics against cost, and what alpha does to the losses by step."""
    curves = [
        Curve("alpha", "alpha of the last step with R-Drop", is_logarithmic=False),
        DIVERGENCE,
        TRAINING_NLL,
        Curve("eval_loss", "validation loss"),
    ]
    # A record made by hand may lack some.
    curves = [c for c in curves if all(any(c.key in e for e in r.history) for r in records)]
    drawn = _draw_cost(records, metrics, folder)
    path = draw_curves(records, curves, "step", folder / "alpha_schedules.png")
    title = "Alpha, the KL between passes, and training and validation loss, by step"
    return [*drawn, (path, title)]


def _apart(values: Sequence[float]) -> list[float]:
    """Return places of points, those that share one a little apart."""
    step = 0.015 * (max(values) - min(values) or 1.0)
    result = []
    for i, value in enumerate(values):
        same = [j for j, other in enumerate(values) if abs(other - value) <= step]
        result.append(value + step * (same.index(i) - (len(same) - 1) / 2))
    return result


def _every_n_series(record: RunRecord) -> Sequence[str]:
    rdrop: dict[str, Any] = record.config["rdrop"]
    paper, rescaled = "alpha, as in the paper", "alpha times k"
    if rdrop["num_passes"] == 1:
        return ()
    if rdrop["every_n_steps"] == 1:
        return (paper, rescaled)
    return (rescaled,) if rdrop["rescale"] else (paper,)


def _one_series(record: RunRecord) -> Sequence[str]:
    return ("R-Drop",)


DRAWERS: dict[str, Drawer] = {
    "alpha": partial(_draw_lines, "alpha", "alpha", _one_series),
    "alpha-schedules": _draw_alpha_schedules,
    "every-n-steps": partial(
        _draw_lines, "every_n_steps", "k, steps for one with R-Drop", _every_n_series
    ),
    "num-passes": partial(_draw_lines, "num_passes", "number of passes", _one_series),
    "dropout-rates": _draw_rates,
    "cost": _draw_cost,
}
