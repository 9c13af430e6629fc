"""Losses where torch traces: shapes alone (`FakeTensorMode`), or a graph (`make_fx`)."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from implementations import CPP
from regdrop import (
    RDropConfig,
    linear_rdrop_cross_entropy,
    rdrop_binary_cross_entropy_with_logits,
    rdrop_cross_entropy,
    rdrop_mse_loss,
    rdrop_step,
    symmetric_kl,
)

IMPLEMENTATIONS = ["auto", "chunked", "eager", CPP]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_shapes_alone_are_enough(impl):
    with FakeTensorMode():
        logits = torch.randn(8, 5, requires_grad=True)
        found = rdrop_cross_entropy(logits, torch.randint(0, 5, (4,)), alpha=1.0, impl=impl)
        found.loss.backward()
    assert found.loss.shape == found.kl.shape == ()
    assert logits.grad.shape == (8, 5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_traced_gradient_is_that_of_other_logits_too(impl):
    def gradient(logits, target):
        logits = logits.detach().requires_grad_()
        loss = rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl).loss
        return torch.autograd.grad(loss, logits)[0]

    target = torch.tensor([0, 4, -100, 2])
    graph = make_fx(gradient)(torch.randn(8, 5), target)
    others = torch.randn(8, 5)
    torch.testing.assert_close(graph(others, target), gradient(others, target))


@pytest.mark.parametrize(
    "options", [{}, {"passes": "sequential"}, {"fraction": 0.5}, {"backward_passes": 1}]
)
def test_a_step_and_the_other_losses_need_no_numbers(options):
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5))
        x, y = torch.randn(4, 3), torch.randint(0, 5, (4,))
        step = rdrop_step(model, x, y, config=RDropConfig(**options), step=0)
        hidden, weight = (torch.randn(n, 3, requires_grad=True) for n in (8, 5))
        logits, numbers = torch.randn(8, 5, requires_grad=True), torch.rand(4, 5)
        losses = [
            step.loss,
            linear_rdrop_cross_entropy(hidden, weight, y, alpha=1.0).loss,
            rdrop_binary_cross_entropy_with_logits(logits, numbers, alpha=1.0).loss,
            rdrop_mse_loss(logits, numbers, alpha=1.0).loss,
            symmetric_kl(logits),
        ]
        for loss in losses:
            loss.backward()
    assert weight.grad.shape == (5, 3)
    assert model[0].weight.grad.shape == (5, 3)
