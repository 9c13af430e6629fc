import numpy as np

from regdrop.experiments.reporting.plots import draw_plots
from regdrop.experiments.reporting.tables import find_metrics


def test_curves_are_the_means_of_the_records(tmp_path, record, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    records = [record(seed=0, accuracy=0.8, seconds=60.0), record(seed=1, seconds=120.0)]
    draw_plots(records, find_metrics(records), tmp_path)
    by_step, by_minute = figures
    panels = {axes.get_title(): axes for axes in by_step.axes}
    assert list(panels) == [
        "training NLL (with dropout)",
        "validation accuracy (%)",
        "validation NLL",
        "KL between passes",
    ]
    line = panels["validation accuracy (%)"].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [2, 4])
    np.testing.assert_allclose(line.get_ydata(), [85, 85])
    np.testing.assert_allclose(
        panels["KL between passes"].lines[0].get_ydata(), 0.1 / np.arange(1, 5)
    )
    minutes = by_minute.axes[0].lines[0].get_xdata()
    np.testing.assert_allclose(minutes, 1.5 * np.arange(1, 5) / 4)
