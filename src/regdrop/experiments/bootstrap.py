"""95 % intervals over the examples of a test set, by the percentile bootstrap."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Figures = Callable[[np.ndarray], dict[str, float]]

SAMPLES = 1000
_SEED = 0


class Interval(NamedTuple):
    """The 2.5 % and 97.5 % quantiles over resampled test sets."""

    low: float
    high: float


def bootstrap(
    figures: Figures,
    runs: Sequence[np.ndarray],
    baseline: Sequence[np.ndarray] | None = None,
    *,
    samples: int = SAMPLES,
) -> dict[str, Interval]:
    """Return intervals of the mean figures of several runs, or of their difference to others.

    The same examples are drawn for every run, with replacement, as many as there are (Koehn 2004).

    Args:
        figures: Computes the figures of some examples from their statistics.
        runs: Statistics of each run, (examples, statistics), of the same examples.
        baseline: Those of the runs whose mean figures are subtracted.
        samples: Number of resampled test sets.

    Raises:
        ValueError: If there are no runs, or they have different numbers of examples.
    """
    everything = [*runs, *(baseline or ())]
    sizes = {len(statistics) for statistics in everything}
    if not runs or len(sizes) != 1:
        raise ValueError(f"runs must be of the same examples, got sizes {sorted(sizes)}")
    (size,) = sizes
    generator = np.random.default_rng(_SEED)
    drawn: dict[str, list[float]] = {}
    for _ in range(samples):
        chosen = generator.integers(size, size=size)
        means = _mean_figures(figures, runs, chosen)
        others = {} if baseline is None else _mean_figures(figures, baseline, chosen)
        for name, value in means.items():
            drawn.setdefault(name, []).append(value - others.get(name, 0.0))
    return {
        name: Interval(*(float(q) for q in np.quantile(values, (0.025, 0.975))))
        for name, values in drawn.items()
    }


def _mean_figures(
    figures: Figures, runs: Sequence[np.ndarray], chosen: np.ndarray
) -> dict[str, float]:
    each = [figures(statistics[chosen]) for statistics in runs]
    return {name: float(np.mean([own[name] for own in each])) for name in each[0]}
