import contextlib
import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regdrop import RDropConfig, dropout_rates, rdrop_step
from regdrop.passes import run_passes, scale_dropout_odds


class Noted(nn.Module):
    """Functional dropout that notes the rate in force forward and backward."""

    def __init__(self, rate=0.1):
        super().__init__()
        self.dropout = rate
        self.scale = nn.Parameter(torch.ones(()))
        self.forward_rates, self.backward_rates = [], []

    def forward(self, x):
        self.forward_rates.append(self.dropout)
        y = x * self.scale
        if y.requires_grad:
            y.register_hook(lambda grad: self.backward_rates.append(self.dropout))
        return F.dropout(y, self.dropout, self.training)


def run(model, rates, num_passes=2, size=8):
    with dropout_rates(model, rates):
        out = run_passes(model, torch.ones(size), num_passes=num_passes, strategy="sequential")
        out.sum().backward()
    return out.detach().view(num_passes, size)


def test_one_rate_is_in_force_inside_and_gone_outside():
    model = nn.Sequential(nn.Dropout(0.1), Noted(0.3))
    with dropout_rates(model, 0.5):
        assert (model[0].p, model[1].dropout) == (0.5, 0.5)
    assert (model[0].p, model[1].dropout) == (0.1, 0.3)


def test_each_pass_has_its_own_rate_forward_and_backward():
    model = Noted().train()
    run(model, (0.2, 0.6))
    assert model.forward_rates == [0.2, 0.6]
    # The last pass is the first to go backward.
    assert model.backward_rates == [0.6, 0.2]
    assert model.dropout == 0.1


@pytest.mark.parametrize("backward_passes", [None, 1, 2, 3])
def test_the_first_passes_have_the_first_rates_whichever_runs_first(backward_passes):
    model, rates = Noted().train(), (0.1, 0.2, 0.6)
    options = {"num_passes": 3, "strategy": "sequential", "backward_passes": backward_passes}
    graded = 3 if backward_passes is None else backward_passes
    with dropout_rates(model, rates):
        for _ in range(2):
            model.forward_rates.clear()
            model.backward_rates.clear()
            run_passes(model, torch.ones(8), **options).sum().backward()
            assert tuple(model.forward_rates[3 - graded :]) == rates[:graded]
            assert sorted(model.forward_rates) == list(rates)
            assert sorted(model.backward_rates) == list(rates[:graded])


def test_a_rate_a_pass_is_refused_where_passes_are_stacked():
    model, x, y = nn.Sequential(nn.Dropout(0.1), nn.Linear(3, 2)), torch.ones(4, 3), torch.zeros(4)
    step = partial(rdrop_step, model, x, y.long(), step=0)
    with dropout_rates(model, 0.3):
        assert step(config=RDropConfig()).kl > 0
    with (
        pytest.raises(ValueError, match=r"rates must be one number .* stacked .* got \[0.1, 0.5\]"),
        dropout_rates(model, [0.1, 0.5]),
    ):
        step(config=RDropConfig())
    assert model[0].p == 0.1
    with dropout_rates(model, [0.1, 0.5]):  # each forward is one pass
        step(config=RDropConfig(backward_passes=1)).loss.backward()


class Failing(Noted):
    """Fails in the forward of one number, counted from 0."""

    def __init__(self, number):
        super().__init__()
        self.number, self.calls = number, 0

    def forward(self, x):
        y = super().forward(x)
        self.calls += 1
        if self.calls - 1 == self.number:
            raise RuntimeError("out of memory")
        return y


def run_steps(model, config, steps):
    """Run steps of `rdrop_step`, skip those that fail, and return the rates that each saw."""
    x, y = torch.randn(4, 3), torch.zeros(4).long()
    seen = []
    with dropout_rates(model, (0.1, 0.4)):
        for step in range(steps):
            model.forward_rates.clear()
            with contextlib.suppress(RuntimeError):
                rdrop_step(model, x, y, config=config, step=step).loss.backward()
            seen.append([*model.forward_rates])
    return seen


def test_a_step_of_one_pass_has_the_first_rate_and_uses_up_none():
    config = RDropConfig(passes="sequential", every_n_steps=2)
    assert run_steps(Noted().train(), config, 4) == [[0.1, 0.4], [0.1], [0.1, 0.4], [0.1]]


@pytest.mark.parametrize(("backward_passes", "order"), [(None, [0.1, 0.4]), (1, [0.4, 0.1])])
def test_a_forward_that_fails_moves_no_rate_to_another_pass(backward_passes, order):
    config = RDropConfig(passes="sequential", backward_passes=backward_passes)
    assert run_steps(Failing(0).train(), config, 3) == [order[:1], order, order]


def test_a_forward_of_a_pass_may_call_the_model_twice():
    model = Noted().train()
    with dropout_rates(model, (0.1, 0.4)):
        run_passes(
            lambda x: model(x) + model(x), torch.ones(4), num_passes=2, strategy="sequential"
        )
    assert model.forward_rates == [0.1, 0.1, 0.4, 0.4]


def test_a_monitored_pass_has_the_rate_of_the_last():
    config = RDropConfig(passes="sequential", every_n_steps=2, monitor_steps=1)
    steps = run_steps(Noted().train(), config, 4)
    assert steps == [[0.1, 0.4], [0.4, 0.1], [0.1, 0.4], [0.4, 0.1]]


def test_one_pass_inside_a_pass_has_its_rate():
    model = Noted().train()
    with dropout_rates(model, (0.1, 0.4)):
        run_passes(
            lambda x: run_passes(model, x, num_passes=1),
            torch.ones(4),
            num_passes=2,
            strategy="sequential",
        )
    assert model.forward_rates == [0.1, 0.4]


def test_a_loop_of_ones_own_cycles_and_begins_anew_after_a_forward_that_failed():
    model, x = Failing(2).train(), torch.ones(4)
    with dropout_rates(model, (0.1, 0.4)):
        for _ in range(5):
            with contextlib.suppress(RuntimeError):
                model(x)
        run_passes(model, x, num_passes=2, strategy="sequential")
        model(x)
    assert model.forward_rates == [0.1, 0.4, 0.1, 0.1, 0.4, 0.1, 0.4, 0.1]


@pytest.mark.parametrize("rates", [(0.1, 0.5), (0.5, 0.1)])
def test_kept_units_are_as_many_as_the_rate_says_and_scaled_by_it(rates):
    torch.manual_seed(0)
    passes = run(nn.Sequential(nn.Dropout(0.3), Noted(0.0)).train(), rates, size=20_000)
    for outputs, rate in zip(passes, rates, strict=True):
        assert (outputs == 0).float().mean().item() == pytest.approx(rate, abs=0.02)
        assert outputs.max().item() == pytest.approx(1 / (1 - rate))


def test_sources_that_are_off_stay_off():
    model = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.1))
    with dropout_rates(model, 0.5):
        assert (model[0].p, model[1].p) == (0.0, 0.5)


def test_stochastic_depth_and_layerdrop_keep_their_rates():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.layerdrop, self.drop_path_rate = 0.1, 0.2, 0.3

    model = Model()
    with dropout_rates(model, 0.5):
        assert (model.dropout, model.layerdrop, model.drop_path_rate) == (0.5, 0.2, 0.3)


def test_evaluation_does_not_use_up_a_rate():
    model = Noted().eval()
    with dropout_rates(model, (0.2, 0.6)):
        model(torch.ones(2))
        model.train()
        model(torch.ones(2))
    assert model.forward_rates[1] == 0.2


def test_rates_come_back_after_an_error_and_stay_after_a_late_backward():
    model, outputs = Noted().train(), []

    def stop():
        with dropout_rates(model, (0.2, 0.6)):
            outputs.append(model(torch.ones(2)))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    outputs[0].sum().backward()
    assert model.dropout == 0.1
    model(torch.ones(2))
    assert model.forward_rates == [0.2, 0.1]


@pytest.mark.parametrize("rates", [0.5, (0.2, 0.6)])
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_made_inside_has_its_own_rates(rates, make_copy):
    model = nn.Sequential(nn.Dropout(0.1), Noted(0.3)).train()
    with dropout_rates(model, rates):
        model(torch.ones(2))
        other = make_copy(model)
        other(torch.ones(2)).sum().backward()
        assert (other[0].p, other[1].dropout) == (0.1, 0.3)
        other[0].p = 0.4
        model(torch.ones(2))
        other(torch.ones(2)).sum().backward()
    assert (other[0].p, other[1].dropout) == (0.4, 0.3)
    assert other[1].forward_rates[1:] == other[1].backward_rates == [0.3, 0.3]
    assert model[1].forward_rates == [0.5, 0.5] if rates == 0.5 else [0.2, 0.6]


def test_outputs_in_dictionaries_and_tuples_are_followed_too():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Noted()

        def forward(self, x):
            return {"logits": (self.inner(x), None)}

    model = Wrapped().train()
    with dropout_rates(model, (0.2, 0.6)):
        first, second = (model(torch.ones(2))["logits"][0] for _ in range(2))
        (first.sum() + second.sum()).backward()
    assert model.inner.backward_rates == [0.6, 0.2]


@pytest.mark.parametrize("rates", [1.0, -0.1, (), (0.1, 1.5)])
def test_rates_out_of_range_are_refused(rates):
    with (
        pytest.raises(ValueError, match="rates must be one or more numbers from 0 up to 1"),
        dropout_rates(nn.Dropout(0.1), rates),
    ):
        pass


def test_a_model_without_an_active_rate_is_refused():
    with (
        pytest.raises(ValueError, match="must have a dropout rate above 0"),
        dropout_rates(nn.Dropout(0.0), 0.1),
    ):
        pass


def test_gradient_checkpointing_is_refused():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertModel(BertConfig(**sizes, intermediate_size=8, vocab_size=20)).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"), dropout_rates(model, 0.3):
        pass


def test_gradient_checkpointing_of_timm_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    model.grad_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing"), dropout_rates(model, 0.3):
        pass


def test_a_rate_of_one_stays():
    model = nn.Sequential(nn.Dropout(1.0), nn.Dropout(0.5))
    scale_dropout_odds(model, 2.0)
    assert [module.p for module in model] == [1.0, pytest.approx(2 / 3)]


def test_odds_are_multiplied_and_rates_of_zero_stay():
    model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.5), nn.Dropout(0.0))
    scale_dropout_odds(model, 4.0)
    assert [m.p for m in model] == pytest.approx([4 / 13, 0.8, 0.0])
    with pytest.raises(ValueError, match="factor must be above 0, got 0"):
        scale_dropout_odds(model, 0)
    with pytest.raises(ValueError, match="found none"):
        scale_dropout_odds(nn.Linear(2, 2), 2.0)
