"""Weights that autocast converts and keeps, those of a forward without a gradient among them."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from regdrop import RDropConfig, rdrop_step, share_prefix
from regdrop.disagreement import measure_disagreement
from regdrop.extra_pass import extra_pass
from regdrop.prefix_search import suggest_prefix

CONFIGS = [
    RDropConfig(backward_passes=1),
    RDropConfig(backward_passes=1, passes="sequential"),
    RDropConfig(every_n_steps=2, monitor_steps=1),
]


class KeepingLinear(nn.Linear):
    """Keeps what it converted, with or without a gradient, as the autocast of older torch does."""

    def __init__(self, kept, *sizes):
        super().__init__(*sizes)
        self.kept = kept

    def forward(self, x):
        if self not in self.kept:
            self.kept[self] = self.weight.bfloat16()
        return nn.functional.linear(x, self.kept[self].float(), self.bias)


@pytest.fixture
def kept(monkeypatch):
    weights = {}
    monkeypatch.setattr(torch, "clear_autocast_cache", weights.clear)
    return weights


def batch():
    return torch.randn(8, 6), torch.randint(0, 3, (8,))


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_that_were_kept_of_a_pass_without_a_gradient_get_theirs(config, kept):
    model = nn.Sequential(KeepingLinear(kept, 6, 16), nn.Dropout(0.5), KeepingLinear(kept, 16, 3))
    rdrop_step(model, *batch(), config=config, step=1).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_so_do_those_of_a_part_that_was_checked(kept):
    model = nn.Sequential(KeepingLinear(kept, 6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    share_prefix(model, "0")
    rdrop_step(model, *batch(), config=RDropConfig(), step=0).loss.backward()
    assert model[0].weight.grad is not None


def failing(model):
    def forward(x):
        model(x)
        raise MemoryError

    return forward


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, x, y: extra_pass(model, model, x),
        lambda model, x, y: extra_pass(model, failing(model), x),
        lambda model, x, y: measure_disagreement(model, [(x, y)], num_masks=2),
        lambda model, x, y: measure_disagreement(model, [(x, y)], forward=failing(model)),
        lambda model, x, y: suggest_prefix(model, [x]),
    ],
)
def test_so_do_those_of_a_model_that_was_measured(measure, kept):
    model = nn.Sequential(KeepingLinear(kept, 6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    with suppress(MemoryError):
        measure(model, *batch())
    assert kept == {}


@pytest.mark.parametrize("config", CONFIGS)
def test_autocast_around_a_step_loses_no_gradient(config):
    found = []
    for options in ({}, {"dtype": torch.bfloat16}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Dropout(0.3), nn.Linear(16, 3))
        with torch.autocast("cpu", enabled=bool(options), **options):
            loss = rdrop_step(model, *batch(), config=config, step=1).loss
        loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() < 0.05 * exact.norm()
