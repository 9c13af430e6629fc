"""The means of the two terms between two logs."""

import math

import pytest
import torch

from regdrop.loss import ItemCounts
from regdrop.meter import LossMeter
from regdrop.schedule import StepPlan

PLAN = StepPlan(num_passes=2, alpha=2.0, factor=1.0)


def collect(meter, *parts):
    """Return the means of micro-batches, each given as its NLL, KL and number of items."""
    for nll, kl, items in parts:
        count = torch.tensor(items)
        divergence = None if kl is None else torch.tensor(kl)
        meter.add(PLAN, torch.tensor(nll), divergence, ItemCounts(count, count))
    return meter.collect(lambda sums, reduction: sums)


def test_micro_batches_count_by_their_items():
    assert collect(LossMeter(), (1.0, 0.5, 3), (5.0, 0.1, 1)) == pytest.approx(
        {"nll": 2.0, "kl": 0.4, "alpha": 2.0}
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_where_that_is_asked_for(bad):
    parts = [(1.0, 0.5, 3), (bad, 0.3, 2), (5.0, bad, 1)]
    found = collect(LossMeter(leaves_out=True), *parts)
    assert found == pytest.approx({"nll": (3 * 1 + 5) / 4, "kl": (1.5 + 0.6) / 5, "alpha": 2.0})
    told = collect(LossMeter(), *parts)
    assert not math.isfinite(told["nll"])
    assert not math.isfinite(told["kl"])


@pytest.mark.parametrize("part", [(math.nan, math.inf, 4), (0.0, 0.0, 0)])
def test_a_mean_over_nothing_is_left_out(part):
    assert collect(LossMeter(leaves_out=True), part) == {"alpha": 2.0}


def test_a_divergence_that_was_not_measured_is_left_out():
    assert collect(LossMeter(), (1.0, None, 4)) == {"nll": 1.0, "alpha": 2.0}


def test_many_micro_batches_are_summed_exactly():
    """Float32 loses a part of every addition to a large sum: 2e-4 of the mean of so many."""
    parts = [(0.1, 0.1, 8191)] * 20_000
    exact = torch.tensor(0.1).item()
    found = collect(LossMeter(), *parts)
    assert found["nll"] == pytest.approx(exact, rel=1e-12)
    assert found["kl"] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_keeps_the_sums_exactly(default):
    meter, resumed = LossMeter(), LossMeter()
    count = torch.tensor(2**24 + 1)
    meter.add(PLAN, torch.tensor(0.1), torch.tensor(0.3), ItemCounts(count, count))
    state = meter.state(lambda sums, reduction: sums)
    assert state["sums"][1] == 2**24 + 1
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        resumed.load(state, torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    assert resumed.state(lambda sums, reduction: sums) == state
