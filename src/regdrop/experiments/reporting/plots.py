"""Curves from records alone: loss and metrics by step and by minute, the KL between passes."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from regdrop.experiments.recording.record import RunRecord
from regdrop.experiments.reporting.tables import runs_by_arm
from regdrop.tasks import Metric
from regdrop.whole_files import write_whole

# Distinct also for colour-blind readers (Okabe and Ito).
COLOURS = ("#000000", "#999999", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
# With the colours as many as the largest study has arms.
_STYLES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 3)), (0, (4, 1, 1, 1, 1, 1)))
_PALETTE = 256
_COLUMNS = 2
_LEGEND_COLUMNS = 5
# As many characters fit into a line of the legend, where each entry's line takes some.
_LEGEND_CHARACTERS = 145
_HANDLE_CHARACTERS = 6
_AXES = {"step": ("step", 1.0), "minute": ("seconds", 60.0)}


class Curve(NamedTuple):
    """What one panel draws of the histories.

    Attributes:
        key: Its name in them.
        title: What the panel is called.
        factor: What it is multiplied by.
        is_logarithmic: Whether its axis is.
    """

    key: str
    title: str
    factor: int = 1
    is_logarithmic: bool = True


TRAINING_NLL = Curve("nll", "training NLL (with dropout)")
DIVERGENCE = Curve("kl", "KL between passes")


def draw_plots(
    records: Sequence[RunRecord], metrics: Mapping[str, Metric], folder: Path
) -> list[tuple[Path, str]]:
    """Draw all curves of a comparison into its folder.

    Args:
        records: Records of one task.
        metrics: Its metrics.
        folder: Where the images are written.

    Returns:
        The image files and their titles.
    """
    evaluated = [
        Curve(f"eval_{name}", f"validation {metric.title}", metric.factor, name == "nll")
        for name, metric in metrics.items()
    ]
    curves = [TRAINING_NLL, *evaluated, DIVERGENCE]
    return [
        (
            draw_curves(records, curves, axis, folder / f"curves_by_{axis}.png"),
            f"Training and validation curves and the KL between passes, by {axis}",
        )
        for axis in _AXES
    ]


def draw_curves(
    records: Sequence[RunRecord],
    curves: Sequence[Curve],
    axis: str,
    path: Path,
) -> Path:
    """Draw what the histories of all arms hold, a panel each.

    Args:
        records: Records of one task.
        curves: That of each panel.
        axis: "step" or "minute".
        path: Where the image is written.
    """
    figure, panels = new_figure(len(curves))
    for curve, panel in zip(curves, panels, strict=False):
        _draw_curve(panel, records, curve, axis)
        panel.set_title(curve.title)
        panel.set_xlabel("optimiser step" if axis == "step" else "training minutes")
        if curve.is_logarithmic:
            panel.set_yscale("log")
        panel.grid(alpha=0.3, which="both")
    return save_figure(figure, path)


def new_figure(count: int) -> tuple[Any, Iterator[Any]]:
    """Return a figure and the panels of a grid of two columns, at least so many."""
    # The object interface draws without a display and without global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-count // _COLUMNS)
    figure = Figure(figsize=(11, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for panel in list(panels)[count:]:
        panel.set_visible(False)
    return figure, iter(figure.axes[:count])


def save_figure(figure: Any, path: Path, *, legend: bool = True) -> Path:
    """Save a figure, below it the legend of its first panel."""
    if legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        longest = max(map(len, labels)) + _HANDLE_CHARACTERS
        columns = max(1, min(len(labels), _LEGEND_COLUMNS, _LEGEND_CHARACTERS // longest))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    write_whole(path, partial(_write_png, figure))
    return path


def _write_png(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, format="png")
    # A plot has few colours: with a palette of them it takes half of the bytes. Of fewer than 256,
    # two thin lines may become one colour.
    with Image.open(path) as image:
        drawn = image.convert("RGB").quantize(_PALETTE, dither=Image.Dither.NONE)
    drawn.save(path, format="PNG", optimize=True)


def _draw_curve(panel: Any, records: Sequence[RunRecord], curve: Curve, axis: str) -> None:
    for i, (name, runs) in enumerate(runs_by_arm(records).items()):
        colour = COLOURS[i % len(COLOURS)]
        style = _STYLES[i // len(COLOURS) % len(_STYLES)]
        x, values = _series(runs, curve.key, axis)
        if not len(x):
            continue
        values = values * curve.factor
        mean = values.mean(0)
        marker = "o" if len(x) == 1 else None
        panel.plot(x, mean, color=colour, linestyle=style, marker=marker, label=name, linewidth=1.6)
        if len(values) > 1:
            panel.fill_between(
                x, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0
            )


def _series(records: Sequence[RunRecord], key: str, axis: str) -> tuple[Any, Any]:
    """Return the common steps (or the mean minutes at them) and the metrics, (seeds, steps)."""
    entries = [
        {entry["step"]: entry for entry in record.history if key in entry} for record in records
    ]
    steps = sorted(set.intersection(*(set(own) for own in entries)))
    values = np.array([[own[step][key] for step in steps] for own in entries])
    field, unit = _AXES[axis]
    positions = np.array([[own[step][field] / unit for step in steps] for own in entries])
    return positions.mean(0), values
