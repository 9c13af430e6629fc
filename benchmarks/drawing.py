"""Curves of a benchmark: one line for each variant, the middle of its rounds and their spread."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from recording import Row
from regdrop.experiments.reporting.plots import COLOURS, new_figure, save_figure

Panel = tuple[Sequence[Row], str, str, str]


def draw_sweeps(
    rows: Sequence[Row],
    sweeps: Mapping[str, Sequence[tuple[int, int]]],
    titles: Mapping[str, str],
    path: Path,
    console: Console,
) -> None:
    """Draw figures in float32 against each of two sizes, the other one held.

    Args:
        rows: The rows of the record.
        sweeps: Shapes, items first, by the size that varies among them; the last is "items".
        titles: Titles by the key of a figure, which rows may lack.
        path: Where the image is written.
        console: Where that is said.
    """
    other_size = next(iter(sweeps))
    panels: list[Panel] = []
    for axis, shapes in sweeps.items():
        items, other = shapes[0]
        held = f"{other:,} {other_size}" if axis == "items" else f"{items} items"
        chosen = [
            row
            for row in rows
            if (row["items"], row[other_size]) in shapes and row["dtype"] == "float32"
        ]
        for key, title in titles.items():
            panels.append(([r for r in chosen if key in r], axis, key, f"{title}, {held}"))
    draw(panels, path, console)


def draw(panels: Sequence[Panel], path: Path, console: Console) -> None:
    """Draw a line a variant, both axes logarithmic; bands are the 10th to the 90th percentile.

    Args:
        panels: Of each panel its rows, the key of its x axis, that of its y axis, and its title.
        path: Where the image is written.
        console: Where that is said.
    """
    figure, axes = new_figure(len(panels))
    variants = list(dict.fromkeys(row["variant"] for rows, *_ in panels for row in rows))
    for axis, (rows, x, y, title) in zip(axes, panels, strict=True):
        for i, variant in enumerate(variants):
            own = sorted((r for r in rows if r["variant"] == variant), key=lambda row: row[x])
            colour, style = COLOURS[i % len(COLOURS)], ("-", "--")[i // len(COLOURS)]
            places = [row[x] for row in own]
            low, middle, high = (
                [_part(row[y], p) for row in own] for p in ("p10", "median", "p90")
            )
            axis.plot(places, middle, color=colour, linestyle=style, marker="o", label=variant)
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel=x, title=title)
        axis.grid(alpha=0.3, which="both")
    save_figure(figure, path)
    console.print(f"drawn to {path}")


def _part(value: object, name: str) -> float:
    """Return a part of a spread, or the number that is none."""
    return float(value[name] if isinstance(value, Mapping) else value)
