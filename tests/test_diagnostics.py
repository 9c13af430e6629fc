import warnings

import pytest
from torch import nn

from models import noisy_model
from regdrop import RDropConfig
from regdrop.diagnostics import (
    dropout_report,
    expected_cost,
    warn_without_dropout,
    warn_zero_divergence,
)


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
        ({"alpha": "auto", "single_pass_below": 6.5}, 1.5),
        ({"alpha": "auto", "single_pass_below": 5.2, "every_n_steps": 2}, 1.343),
        ({"alpha": "auto", "alpha_start": 0.0, "alpha_max": 4.0, "single_pass_below": 1.0}, 1.75),
        ({"alpha": "auto", "single_pass_below": 6.5, "backward_passes": 1}, 7 / 6),
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
        ({"alpha": "auto", "single_pass_below": 6.5, "start_step": 20}, 1.4),
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
    config = RDropConfig(alpha="auto", single_pass_below=6.5, every_n_steps=2)
    cost = next(line for line in dropout_report(noisy_model(), config) if "costs" in line)
    assert "about 1.25 single-pass" in cost
    assert "alpha='auto', num_passes=2, every_n_steps=2, single_pass_below=6.5" in cost
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
