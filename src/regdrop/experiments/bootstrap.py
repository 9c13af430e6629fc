"""95 % intervals over the examples of a test set, by the percentile bootstrap."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

ComputeMetrics = Callable[[np.ndarray], dict[str, float]]

SAMPLES = 1000
_SEED = 0


class Interval(NamedTuple):
    """The 2.5 % and 97.5 % quantiles over resampled test sets."""

    low: float
    high: float


def resample(
    compute_metrics: ComputeMetrics, runs: Sequence[np.ndarray], *, samples: int = SAMPLES
) -> dict[str, np.ndarray]:
    """Return the mean metrics of several runs on resampled test sets, (samples,) each.

    The same examples are drawn for every run and in every call with test sets of one size, with
    replacement, as many as there are (Koehn 2004): results of two calls are paired.

    Args:
        compute_metrics: Computes the metrics of some examples from their statistics.
        runs: Statistics of each run, (examples, statistics), of the same examples.
        samples: Number of resampled test sets.

    Raises:
        ValueError: If there are no runs, or they have different numbers of examples.
    """
    sizes = {len(statistics) for statistics in runs}
    if len(sizes) != 1:
        raise ValueError(f"runs must be of the same examples, got sizes {sorted(sizes)}")
    (size,) = sizes
    generator = np.random.default_rng(_SEED)
    drawn: dict[str, list[float]] = {}
    for _ in range(samples):
        chosen = generator.integers(size, size=size)
        each = [compute_metrics(statistics[chosen]) for statistics in runs]
        for name in each[0]:
            drawn.setdefault(name, []).append(float(np.mean([own[name] for own in each])))
    return {name: np.array(values) for name, values in drawn.items()}


def interval(values: np.ndarray) -> Interval:
    """Return the interval that 95 % of resampled metrics, or of their differences, lie in."""
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(float(low), float(high))
