import math

import numpy as np
import pytest
from scipy import stats

from regdrop.experiments import estimate, paired_difference
from regdrop.experiments.statistics import Estimate


def test_interval_is_students_by_hand():
    # Mean 3, standard error sqrt(2.5 / 5); the 97.5 % point of t with 4 degrees is 2.776445.
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half_width == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)
    assert found.seeds == 5
    assert found.excludes_zero


def test_interval_covers_the_mean_in_95_of_100_samples():
    generator = np.random.default_rng(0)
    samples = generator.normal(2.0, 3.0, (2000, 5))
    covered = [abs(e.mean - 2) <= e.half_width for e in map(estimate, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_interval():
    found = estimate([1.0])
    assert (found.mean, found.half_width, found.seeds) == (1.0, math.inf, 1)
    assert not found.excludes_zero


def test_differences_are_paired_by_seed():
    a = {0: 1.0, 1: 5.0, 2: 3.5, 7: 100.0}
    b = {2: 3.0, 1: 4.0, 0: 0.5, 9: -100.0}
    found = paired_difference(a, b)
    expected = stats.ttest_rel([1.0, 5.0, 3.5], [0.5, 4.0, 3.0]).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)
    assert found.seeds == 3


def test_nothing_to_estimate():
    with pytest.raises(ValueError, match="values must hold at least one number"):
        estimate([])
    with pytest.raises(ValueError, match=r"no seed in common: \[0\] and \[1\]"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_an_interval_that_ends_at_zero_holds_it():
    assert not Estimate(1.0, 1.0, 2).excludes_zero
    assert Estimate(-1.0, 0.5, 2).excludes_zero
