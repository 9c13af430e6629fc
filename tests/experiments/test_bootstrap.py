import numpy as np
import pytest

from regdrop.experiments.bootstrap import interval, resample


def mean(statistics):
    return {"mean": float(statistics[:, 0].mean())}


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3.0, 2.0, (400, 1))
    low, high = interval(resample(mean, [values])["mean"])
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.04)
    assert high == pytest.approx(values.mean() + half, abs=0.04)


def test_the_interval_leaves_out_a_fortieth_at_either_end():
    assert interval(np.random.default_rng(0).permutation(1001)) == (25, 975)


def test_a_difference_is_paired_by_example():
    values = np.random.default_rng(0).normal(0.0, 5.0, (200, 1))
    ours, theirs = (resample(mean, runs)["mean"] for runs in ([values + 1, values + 3], [values]))
    low, high = interval(ours - theirs)
    assert low == pytest.approx(2.0)
    assert high == pytest.approx(2.0)


def test_runs_of_other_examples_are_refused():
    with pytest.raises(ValueError, match="runs must be of the same examples, got sizes"):
        resample(mean, [np.zeros((3, 1)), np.zeros((4, 1))])
    with pytest.raises(ValueError, match="runs must be of the same examples"):
        resample(mean, [])
