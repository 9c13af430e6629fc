"""How far the sub-models of a run are apart, and how well each of them predicts, as a figure."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regdrop.disagreement import Disagreement
from regdrop.experiments.reporting.plots import COLOURS, new_figure, save_figure


def draw_disagreement(splits: Mapping[str, Disagreement], path: Path) -> Path:
    """Draw the distances and the predictions of each split, as bars side by side.

    Args:
        splits: Disagreement by the name of the split, of at most two.
        path: Where the image is written.
    """
    figure, panels = new_figure(4)
    distances = {
        "P, P'": "epkl",
        "P, M": "kl_submodel_mean",
        "M, P": "kl_mean_submodel",
        "P, G": "kl_submodel_geometric",
        "G, P": "kl_geometric_submodel",
        "G, D": "kl_geometric_deployed",
        "M, D": "kl_mean_deployed",
    }
    names = {"P": "submodel", "M": "mean", "G": "geometric", "D": "deployed"}
    kinds = (
        ("NLL", "nll", 1),
        ("accuracy (%)", "accuracy", 100),
        ("calibration error (%)", "calibration_error", 100),
    )
    panel = next(panels)
    _bars(panel, splits, list(distances), lambda s: [getattr(s, d) for d in distances.values()])
    panel.set_title("KL in nats: sub-models P, mean M, geometric mean G, deployed D")
    for (title, field, factor), panel in zip(kinds, panels, strict=True):

        def values(s: Disagreement, field: str = field, factor: int = factor) -> list[float]:
            return [getattr(getattr(s, name), field) * factor for name in names.values()]

        _bars(panel, splits, list(names), values)
        panel.set_title(title)
    return save_figure(figure, path)


def _bars(
    panel: Any,
    splits: Mapping[str, Disagreement],
    labels: Sequence[str],
    values: Callable[[Disagreement], Sequence[float]],
) -> None:
    width = 0.8 / len(splits)
    colours = (COLOURS[3], COLOURS[2])
    for i, (name, found) in enumerate(splits.items()):
        places = [x + (i - (len(splits) - 1) / 2) * width for x in range(len(labels))]
        panel.bar(places, values(found), width, label=name, color=colours[i])
    panel.set_xticks(range(len(labels)), labels)
    panel.grid(alpha=0.3, axis="y")
