"""Opacus, which clips every row as an item: what would break its bound is refused."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from regdrop import RDropConfig, rdrop_step

X, Y = torch.randn(6, 5), torch.arange(6) % 3
WAYS = [{}, {"backward_passes": 1}, {"passes": "sequential", "fraction": 0.5}]


@pytest.fixture
def model(monkeypatch):
    """Return a model whose parameters are marked as Opacus marks them."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    for parameter in model.parameters():
        parameter.grad_sample = None
    monkeypatch.setitem(sys.modules, "opacus", ModuleType("opacus"))
    return model


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, lambda m: lambda x: m(x)])
def test_rows_that_are_no_items_are_refused(model, wrap, options):
    with pytest.raises(ValueError, match=r"passes=.* Opacus.* use passes='sequential' with"):
        rdrop_step(wrap(model), X, Y, config=RDropConfig(**options), step=0)


@pytest.mark.parametrize("options", [{"passes": "sequential"}, {"num_passes": 1, "alpha": 0}])
def test_one_forward_a_pass_is_exact(model, options):
    assert rdrop_step(model, X, Y, config=RDropConfig(**options), step=0).loss.isfinite()


def test_other_models_are_stacked(model):
    other = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    assert rdrop_step(other, X, Y, config=RDropConfig(), step=0).kl > 0
