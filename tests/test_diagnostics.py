import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from regdrop import RDropConfig
from regdrop.diagnostics import (
    dropout_report,
    expected_cost,
    extra_pass,
    measure_divergence,
    warn_without_dropout,
    warn_zero_divergence,
)
from regdrop.loss import cross_entropy_terms
from regdrop.passes import preserve_random_state


def noisy_model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


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


def test_measured_divergence_is_the_mean_over_items_that_count():
    logits, other = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    target = torch.tensor([0, -100, 2, 1])
    p, q = logits.softmax(-1), other.softmax(-1)
    each = ((p - q) * (p.log() - q.log())).sum(-1) / 2
    expected = each[target != -100].mean()
    found = measure_divergence(logits.requires_grad_(), other, target, cross_entropy_terms)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad


def test_a_model_with_dropout_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_without_dropout(nn.Dropout(0.1).train()) is False


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (nn.Linear(2, 2), r"Add dropout to the model"),
        (nn.Sequential(nn.Dropout(0.0)), r"Raise a dropout rate, now 0"),
        (nn.Sequential(nn.Dropout(0.1)).eval(), r"evaluation mode: call model\.train"),
    ],
)
def test_a_model_without_active_dropout_is_warned_about_with_advice(model, advice):
    with pytest.warns(UserWarning, match=rf"R-Drop has nothing to compare.*{advice}"):
        assert warn_without_dropout(model) is True


def test_lora_without_dropout_is_told_the_name_of_its_option():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], lora_dropout=0.0, r=2)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    with pytest.warns(UserWarning, match="has nothing to compare.*Set lora_dropout above 0"):
        warn_without_dropout(model.train())


def test_a_divergence_of_zero_is_warned_about():
    with pytest.warns(UserWarning, match="the KL between passes is exactly 0"):
        warn_zero_divergence()


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        ({"alpha": 0, "num_passes": 1}, 1),
        ({}, 2),
        ({"num_passes": 3}, 3),
        ({"backward_passes": 1}, 4 / 3),
        ({"fraction": 0.25}, 1.25),
        ({"fraction": 0.25, "backward_passes": 1}, 1 + 1 / 12),
        ({"every_n_steps": 4}, 1.25),
        ({"every_n_steps": 2, "backward_passes": 1}, 7 / 6),
        ({"alpha": "auto"}, 2),
        ({"alpha": "auto", "single_pass_below": 8.0}, 1.5),
        ({"alpha": "auto", "alpha_max": 4.0, "single_pass_below": 1.0}, 1.75),
        ({"alpha": "auto", "single_pass_below": 8.0, "every_n_steps": 2}, 1.25),
        ({"alpha": "auto", "single_pass_below": 4.0, "backward_passes": 1}, 1.25),
        # Nobody knows what a rule that follows the validation loss will do.
        ({"alpha": "auto", "alpha_rule": "stall", "single_pass_below": 4.0}, 2),
        # In a long run neither the start nor a ramp of so many steps counts.
        ({"start_step": 500}, 2),
        (
            {
                "alpha": 4.0,
                "alpha_schedule": "linear",
                "alpha_warmup_steps": 700,
                "single_pass_below": 2.0,
            },
            2,
        ),
        (
            {
                "alpha": 4.0,
                "alpha_schedule": "linear",
                "alpha_warmup_ratio": 0.5,
                "single_pass_below": 2.0,
            },
            1.75,
        ),
    ],
)
def test_expected_cost_in_single_pass_steps(options, cost):
    assert expected_cost(RDropConfig(**options)) == pytest.approx(cost, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        ({"start_step": 25}, 1.75),
        ({"start_step": 50, "every_n_steps": 5}, 1.1),
        (
            {
                "alpha": 4.0,
                "alpha_schedule": "linear",
                "alpha_warmup_steps": 40,
                "single_pass_below": 2.0,
            },
            1.8,
        ),
        ({"alpha": "auto", "single_pass_below": 8.0, "start_step": 20}, 1.4),
        ({"start_step": 200}, 1),
    ],
)
def test_expected_cost_of_a_run_counts_its_steps(options, cost):
    assert expected_cost(RDropConfig(**options), total_steps=100) == pytest.approx(cost)


@pytest.mark.parametrize(("alpha", "cost"), [(3.0, 1.0), (7.0, 2.0)])
def test_a_long_run_costs_what_the_end_of_a_falling_alpha_does(alpha, cost):
    config = RDropConfig(
        alpha=alpha,
        alpha_start=10.0,
        alpha_schedule="linear",
        alpha_warmup_steps=4,
        single_pass_below=6,
    )
    assert expected_cost(config) == pytest.approx(cost)


def test_report_names_the_options_that_a_cost_comes_from():
    config = RDropConfig(alpha="auto", single_pass_below=8.0, every_n_steps=2)
    cost = next(line for line in dropout_report(noisy_model(), config) if "costs" in line)
    assert "about 1.25 single-pass" in cost
    assert "alpha='auto', num_passes=2, every_n_steps=2, single_pass_below=8.0" in cost
    plain = next(line for line in dropout_report(noisy_model()) if "costs" in line)
    assert plain.endswith("(num_passes=2).")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (noisy_model(), ["1 of 1 sources", "2.00 single-pass", "1.33 single-pass", "BatchNorm"]),
        (nn.Sequential(nn.Dropout(0.0)), ["0 of 1 sources", "Raise a dropout rate"]),
    ],
)
def test_report_says_what_to_change(model, expected):
    text = "\n".join(dropout_report(model))
    assert all(part in text for part in expected)


def test_report_of_layerdrop_asks_for_sequential_passes():
    model = nn.Linear(2, 2)
    model.layerdrop = 0.1
    assert any("passes='sequential'" in line for line in dropout_report(model))
    done = RDropConfig(passes="sequential")
    assert not any("passes='sequential'" in line for line in dropout_report(model, done))


def test_report_is_of_the_options_that_it_is_given():
    model = noisy_model()
    text = "\n".join(dropout_report(model, RDropConfig(num_passes=3)))
    assert "3.00 single-pass steps" in text
    assert "without bias at about 1.67" in text
    rare = "\n".join(dropout_report(model, RDropConfig(num_passes=3, every_n_steps=2)))
    assert "2.00 single-pass steps" in rare
    assert "without bias" not in rare
    assert "over the stacked batch" in text
    sequential = "\n".join(dropout_report(model, RDropConfig(passes="sequential")))
    assert "running statistics in every pass" in sequential
    single = "\n".join(dropout_report(model, RDropConfig(alpha=0, num_passes=1)))
    assert "BatchNorm" not in single


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
