"""Means and paired differences over seeds, with 95 % intervals by Student's t."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A mean over seeds and its 95 % interval, which is infinite for one seed.

    Attributes:
        mean: The mean.
        half_width: Half the width of the interval.
        seeds: Number of seeds.
    """

    mean: float
    half_width: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values and its interval.

    Raises:
        ValueError: If there is none.
    """
    count = len(values)
    if count == 0:
        raise ValueError("values must hold at least one number, got none")
    mean = float(np.mean(values))
    if count == 1:
        return Estimate(mean, math.inf, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, float(stats.t.ppf(0.975, count - 1)) * error, count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Return the mean difference over the seeds that both have, and its interval.

    Args:
        values: Figure of each seed.
        baseline: Figure of each seed, subtracted.

    Raises:
        ValueError: If they have no seed in common.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(values)} and {sorted(baseline)}")
    return estimate([values[seed] - baseline[seed] for seed in seeds])
