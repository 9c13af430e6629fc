import random

import numpy as np
import pytest
import torch
from torch import nn

from models import noisy_model
from regdrop import RDropConfig, rdrop_step
from regdrop.extra_pass import extra_pass, measure_divergence
from regdrop.loss import cross_entropy_terms
from regdrop.passes import preserve_random_state


def train(model, steps=4, monitored=()):
    """Train by random numbers of all three libraries and return what an extra pass may not move."""
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        x = torch.randn(6, 4) + random.random() + np.random.rand()
        if step in monitored:
            extra = extra_pass(model, model, x)
            assert not extra.requires_grad
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*model.parameters(), *model.buffers()]


def seeded_run(monitored):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    return train(noisy_model().train(), monitored=monitored)


def test_a_monitored_run_is_the_same_run_bit_for_bit():
    for plain, monitored in zip(seeded_run(()), seeded_run((0, 1, 3)), strict=True):
        assert torch.equal(plain, monitored)


def test_an_extra_pass_that_draws_from_all_generators_restores_them():
    def forward(x):
        return x + torch.rand(()) + random.random() + np.random.rand()

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    extra_pass(nn.Identity(), forward, torch.ones(2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_an_extra_pass_restores_after_an_error():
    model, x = noisy_model(), torch.randn(5, 4)
    before = torch.get_rng_state(), model[1].running_mean.clone()

    def forward(x):
        model(x)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        extra_pass(model, forward, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(model[1].running_mean, before[1])


def test_an_extra_pass_has_masks_of_its_own():
    dropout = nn.Dropout(0.5)
    x = torch.ones(1000)
    extra = extra_pass(dropout, dropout, x)
    assert not torch.equal(extra, dropout(x))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_a_monitored_step_measures_noise_of_python_and_numpy(draw):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + draw())

    config = RDropConfig(start_step=10, monitor_steps=1)
    output = rdrop_step(Noisy(4, 3), torch.randn(6, 4), torch.arange(6) % 3, config=config, step=0)
    assert output.kl > 0


def test_another_generator_of_numpy_is_left_as_it_was():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        expected = np.random.get_state(legacy=False)
        extra_pass(nn.Identity(), lambda x: x + np.random.rand(), torch.ones(2))
        assert np.random.get_state(legacy=False) == expected
    finally:
        np.random.set_bit_generator(before)


def test_measured_divergence_is_the_mean_over_items_that_count():
    logits, other = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    target = torch.tensor([0, -100, 2, 1])
    p, q = logits.softmax(-1), other.softmax(-1)
    each = ((p - q) * (p.log() - q.log())).sum(-1) / 2
    expected = each[target != -100].mean()
    found = measure_divergence(logits.requires_grad_(), other, target, cross_entropy_terms)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad


def test_a_pass_beside_training_leaves_the_generator_of_an_apple_device(monkeypatch):
    """Of which torch's own fork knows nothing."""
    states = ["before"]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    with preserve_random_state():
        states.append("drawn from")
    assert states[-1] == "before"


def test_a_pass_beside_training_leaves_buffers_that_grow():
    """Observers of quantisation-aware training begin without a channel."""

    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x):
            self.seen.resize_(x.shape[1]).copy_(x.detach().amax(0))
            return x

    model = nn.Sequential(Observer(), nn.Dropout(0.5)).train()
    seen = model[0].seen
    extra_pass(model, model, torch.randn(4, 3))
    assert model[0].seen is seen
    assert seen.shape == (0,)


def test_a_lazy_module_is_named_before_its_first_batch():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Dropout(0.5)).train()
    with pytest.raises(ValueError, match=r"the buffer 0\.running_mean has no shape"):
        extra_pass(model, model, torch.randn(4, 3))
